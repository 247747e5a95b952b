"""What is fuzzed: a strategy for the input of each reader, and what must hold whatever the input is.

Whatever it reads, a reader returns or raises one of ``hf_megatron.errors``, and does nothing that ``guard`` forbids.
Where another implementation reads the same files, the two must agree: torch and ``pickle`` may look up nothing in a
file that was called harmless, and see the same tensors; ``safetensors`` accepts the same files.
"""

from __future__ import annotations

import io
import pickle
import random
import re
from functools import cache
from pathlib import Path
from typing import cast

import safetensors
import torch
from hypothesis import strategies as st

from hf_megatron.checkpoint.budgets import BudgetError
from hf_megatron.checkpoint.safetensors_header import DTYPES, read_header
from hf_megatron.checkpoint.torch_file import TENSOR_GLOBALS, open_state_dict, open_torch_file
from hf_megatron.checkpoint.unpickle import UnpickleError, read_pickle
from hf_megatron.errors import HfMegatronError
from hf_megatron_conversion.formats.megatron_lm.pickled import MEGATRON_GLOBALS
from hf_megatron_conversion.tensors import raw_bytes
from tests.fuzz import directories, distributed, models, token_files, tokenizing
from tests.fuzz.archives import split_legacy, torch_files
from tests.fuzz.checks import FindError, Reader, require_harmless
from tests.fuzz.conversions import (
    any_directory,
    attempt,
    check_convert,
    check_convert_core,
    check_inspect,
    check_verify,
    conversions,
    healthy_conversion,
    written,
)
from tests.fuzz.documents import safetensors_files
from tests.fuzz.guard import watched
from tests.fuzz.lookups import Lookups, lookups_of, torch_lookups
from tests.fuzz.pickles import pickles

# --- Readers of one file.


def _check_pickle(content: bytes, directory: Path) -> bool:
    (directory / "case.pkl").write_bytes(content)
    with watched(directory):
        try:
            read = read_pickle(io.BytesIO(content), lambda persistent_id: persistent_id)
        except (UnpickleError, BudgetError):
            return False
    missing = lookups_of(lambda: Lookups(io.BytesIO(content)).load()) - {(g.module, g.attribute) for g in read.names}
    if missing:
        raise FindError("a name that pickle looks up was not listed", f"{sorted(missing)} is not in {read.names}.")
    return True


def _check_torch_file(content: bytes, directory: Path) -> bool:
    path = directory / "pytorch_model.bin"
    path.write_bytes(content)
    with watched(directory):
        try:
            open_torch_file(path, MEGATRON_GLOBALS)
        except HfMegatronError:
            return False
    require_harmless(torch_lookups(path), MEGATRON_GLOBALS)
    with watched(directory):
        try:
            tensors = open_state_dict(path)
            read = {name: tensor.read() for name, tensor in tensors.items() if tensor.nbytes < 10**6}
        except HfMegatronError:
            return True
    require_harmless(torch_lookups(path), TENSOR_GLOBALS)
    try:
        expected = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch checks more
        return True
    if isinstance(expected, dict) and all(isinstance(value, torch.Tensor) for value in expected.values()):
        _require_equal(read, expected, set(tensors))
    return True


def _require_equal(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], names: set[str]) -> None:
    if names != set(expected):
        raise FindError("other names than torch reads", f"{sorted(names)} are not {sorted(map(repr, expected))}.")
    for name, tensor in read.items():
        other = expected[name].detach()
        is_same = tensor.dtype == other.dtype and tensor.shape == other.shape
        if not is_same or not torch.equal(raw_bytes(tensor), raw_bytes(other.contiguous())):
            raise FindError("another tensor than torch reads", f"{name} is {tensor!r}, torch has {other!r}")


def _check_safetensors(content: bytes, directory: Path) -> bool:
    path = directory / "model.safetensors"
    path.write_bytes(content)
    with watched(directory):
        try:
            header = read_header(path)
        except HfMegatronError as error:
            header, reason = None, str(error)
    if len(content) > 2 * 10**6:  # more than the reference's limit allows us to compare
        return header is not None
    try:
        with safetensors.safe_open(path, "np") as file:
            theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
            expected = {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in theirs.items()}
            metadata = file.metadata() or {}
    except Exception as error:
        if header is not None:
            reason = re.sub(r"\d+", "N", str(error).removeprefix("Error while deserializing header: "))[:60]
            raise FindError(f"safetensors refuses what we accept: {reason}", str(error)) from None
        return False
    if header is None:
        is_ours = "the limit is" in reason or reason.endswith(" twice.")
        if not is_ours and all(dtype in DTYPES for dtype, _ in expected.values()):
            words = re.sub(r"\d+", "N", reason.partition("model.safetensors")[2])[:60]
            raise FindError(f"safetensors accepts what we refuse: {words}", reason)
        return False
    mine = {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()}
    if (mine, header.metadata) != (expected, metadata):
        raise FindError("safetensors reads another header", f"{mine} {header.metadata} is not {expected} {metadata}")
    data = {name: entry["data"] for name, entry in safetensors.deserialize(content)}
    for name, tensor in header.tensors.items():
        if content[tensor.data_start : tensor.data_stop] != bytes(data[name]):
            raise FindError("safetensors reads other data", name)
    return True


# --- Training checkpoints and adapters.


def _check_training(files: directories.Files, directory: Path) -> bool:
    from hf_megatron.training import optimizer_state, training_state
    from tests.fuzz import training

    source, state = written(files, directory), training.fresh()
    streams, accepted = random.getstate(), True
    for act in (
        lambda: training_state.verify_checkpoint(source),
        lambda: optimizer_state.load_optimizer(state.model, state.optimizer, source),
        lambda: training_state.load_scheduler(state.scheduler, source, step=1, may_skip=False),
        lambda: training_state.load_random_state(source, 0),
    ):
        with watched(directory, training.is_allowed):
            try:
                act()
            except HfMegatronError:
                accepted = False
    random.setstate(streams)
    return accepted


def _check_adapter(files: directories.Files, directory: Path) -> bool:
    from hf_megatron.peft import load_adapter
    from tests.fuzz import training

    source, model = written(files, directory), training.small_model()
    return not isinstance(attempt(directory, lambda: load_adapter(model, source)), HfMegatronError)


def _training_cases() -> st.SearchStrategy[directories.Files]:
    from tests.fuzz import training

    return training.checkpoints()


def _adapter_cases() -> st.SearchStrategy[directories.Files]:
    from tests.fuzz import training

    return training.adapters()


def _pickle_cases() -> st.SearchStrategy[bytes]:
    objects = [{"a": [1, 2.5, None, True, "x", b"y", (1, 2), {3}]}, {"iteration": 3, "args": directories.VARIANTS}]
    seeds = [pickle.dumps(objects[0], protocol) for protocol in range(6)]
    return pickles(
        [*seeds, *(_main_pickle(content) for content in _zips()), *(split_legacy(c)[3] for c in _legacies())]
    )


def _main_pickle(content: bytes) -> bytes:
    import zipfile

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


@cache
def _zips() -> list[bytes]:
    ranks = [directories.megatron_seed(name) for name in ("megatron", "megatron-core")]
    small = directories.torch_bytes({"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16)})
    return [small, small, *(cast(bytes, next(iter(files.values()))) for files in ranks)]


@cache
def _legacies() -> list[bytes]:
    small = {"a": torch.arange(6.0)[2:], "b": torch.ones(3, dtype=torch.int8)}
    return [
        directories.torch_bytes(small, is_zip=False),
        cast(bytes, next(iter(directories.megatron_seed("megatron-bert").values()))),
    ]


@cache
def _safetensors_seeds() -> list[bytes]:
    seeds = directories.hub_seeds()
    found = [
        content for name in ("hub", "tp") for path, content in seeds[name].items() if path.endswith(".safetensors")
    ]
    return cast(list[bytes], found)


def _healthy_training(kind: str) -> directories.Files:
    from tests.fuzz import training

    return training.healthy(kind)


READERS = {
    reader.name: reader
    for reader in (
        Reader("pickle", _pickle_cases, _check_pickle, lambda: _main_pickle(_zips()[0])),
        Reader("torch-file", lambda: torch_files(_zips(), _legacies()), _check_torch_file, lambda: _zips()[0]),
        Reader(
            "safetensors",
            lambda: safetensors_files(_safetensors_seeds()),
            _check_safetensors,
            lambda: _safetensors_seeds()[0],
        ),
        Reader("inspect", any_directory, check_inspect, lambda: directories.hub_seeds()["bin"]),
        Reader(
            "dry-run",
            lambda: conversions(any_directory(), True),
            check_convert,
            lambda: healthy_conversion("tp", dry_run=True),
        ),
        Reader(
            "convert-hub",
            lambda: conversions(models.hub_directories(), False),
            check_convert,
            lambda: healthy_conversion("bin", to="tp", tp_size=2),
        ),
        Reader(
            "convert-megatron",
            lambda: conversions(models.megatron_directories(), False),
            check_convert,
            lambda: healthy_conversion("megatron"),
        ),
        Reader(
            "convert-core",
            lambda: conversions(distributed.core_directories(), False),
            check_convert_core,
            lambda: healthy_conversion("stacked"),
        ),
        Reader("verify", any_directory, check_verify, lambda: directories.hub_seeds()["tp"]),
        Reader("training", _training_cases, _check_training, lambda: _healthy_training("checkpoint")),
        Reader("adapter", _adapter_cases, _check_adapter, lambda: _healthy_training("adapter")),
        Reader(
            "token-files",
            token_files.pairs,
            token_files.check_token_files,
            lambda: token_files.pair(token_files.Index()),
        ),
        Reader(
            "token-directory",
            tokenizing.token_directories,
            tokenizing.check_token_directory,
            tokenizing.interrupted_directory,
        ),
        Reader("tokenize", tokenizing.texts, tokenizing.check_texts, tokenizing.healthy_texts),
    )
}
