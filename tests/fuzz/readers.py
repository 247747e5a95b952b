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
import shutil
import traceback
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from hypothesis import strategies as st

from hf_megatron.checkpoint.budgets import BudgetError
from hf_megatron.checkpoint.safetensors_header import DTYPES, read_header
from hf_megatron.checkpoint.torch_file import TENSOR_GLOBALS, open_state_dict, open_torch_file
from hf_megatron.checkpoint.unpickle import Global, UnpickleError, read_pickle
from hf_megatron.errors import HfMegatronError
from hf_megatron_conversion import convert, inspect, verify
from hf_megatron_conversion.formats import read_model
from hf_megatron_conversion.formats.megatron_lm.pickled import MEGATRON_GLOBALS
from hf_megatron_conversion.tensors import raw_bytes
from tests.conversion.megatron_lm.generator import VOCAB
from tests.fuzz import directories, models
from tests.fuzz.archives import split_legacy, torch_files
from tests.fuzz.documents import safetensors_files
from tests.fuzz.guard import Violation, watched
from tests.fuzz.lookups import Lookups, lookups_of, torch_lookups
from tests.fuzz.pickles import Draw, pick, pickles

Check = Callable[[Any, Path], bool]


class FindError(AssertionError):
    """A case that shows a bug; ``kind`` is the same for cases that show the same one."""

    def __init__(self, kind: str, details: str) -> None:
        super().__init__(f"{kind}\n{details}")
        self.kind = kind


@dataclass(frozen=True)
class Reader:
    """A reader: the strategy for its cases, the check of one, and an undamaged case.

    The check is given an empty directory to work in, and says whether the reader has accepted the case.
    """

    name: str
    cases: Callable[[], st.SearchStrategy[Any]]
    check: Check
    healthy: Callable[[], Any]


def run(reader: Reader, case: Any, directory: Path) -> bool:
    """Check one case, and say whether it was accepted; FindError if something does not hold."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            return reader.check(case, directory)
    except FindError:
        raise
    except Violation as violation:
        kind = re.sub(r"\d+|/\S+", "N", str(violation))[:60]
        raise FindError(_place(violation, "Violation", kind), traceback.format_exc()[-4000:]) from None
    except AssertionError as error:
        raise FindError(_place(error, "AssertionError", str(error)[:60]), traceback.format_exc()[-4000:]) from None
    except Exception as error:
        raise FindError(_place(error, type(error).__name__), traceback.format_exc()[-4000:]) from None


def _place(error: BaseException, *words: str) -> str:
    """The kind of a find: words, and the last line of this package that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "hf_megatron" in frame.filename]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "no frame"
    return " | ".join([*words, last])


def _require_harmless(lookups: set[tuple[str, str]], allowed: Collection[Global]) -> None:
    names = sorted(f"{module}:{name}" for module, name in lookups if "." in name or Global(module, name) not in allowed)
    if names:
        raise FindError("harmless for us, not for pickle", f"It would look up {names}.")


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
    _require_harmless(torch_lookups(path), MEGATRON_GLOBALS)
    with watched(directory):
        try:
            tensors = open_state_dict(path)
            read = {name: tensor.read() for name, tensor in tensors.items() if tensor.nbytes < 10**6}
        except HfMegatronError:
            return True
    _require_harmless(torch_lookups(path), TENSOR_GLOBALS)
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
        if all(dtype in DTYPES for dtype, _ in expected.values()):
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


# --- Readers of directories.


def _attempt(case_directory: Path, act: Callable[[], object]) -> Any:
    """What a call returns, or the error of ours that it raises."""
    with watched(case_directory):
        try:
            return act()
        except HfMegatronError as error:
            result = error
    str(result).encode("utf-8", "replace")
    return result


def _written(files: directories.Files, directory: Path) -> Path:
    (directory / "secret").write_bytes(directories.SECRET)
    directories.write(files, directory / "source")
    return directory / "source"


def _check_inspect(files: directories.Files, directory: Path) -> bool:
    source = _written(files, directory)
    result = _attempt(directory, lambda: inspect(source))
    if isinstance(result, HfMegatronError):
        return False
    if result.format == "hub":
        for path in read_model(source).files:
            if path.suffix == ".bin":
                _require_harmless(torch_lookups(path), TENSOR_GLOBALS)
    return True


@dataclass(frozen=True)
class ConvertCase:
    files: directories.Files
    options: dict[str, Any]


@st.composite
def _conversions(draw: Draw, sources: st.SearchStrategy[directories.Files], dry_run: bool) -> ConvertCase:
    files = draw(sources)
    options: dict[str, Any] = {"to": pick(draw, ["hub", "tp", "megatron-lm"]), "dry_run": dry_run}
    if options["to"] != "hub":
        options["tp_size"] = pick(draw, [2, 2, 1, 4, 3, None])
    options["dtype"] = pick(draw, [None, None, None, "bfloat16", "float64"])
    options["max_shard_size"] = pick(draw, [None, None, None, "2KB", 10**4])
    options["vocab_size"] = pick(draw, [None, VOCAB, 131])
    options["model_type"] = pick(draw, [None, None, "stock", "megatron"])
    return ConvertCase(files, {name: value for name, value in options.items() if value is not None})


def _check_convert(case: ConvertCase, directory: Path) -> bool:
    source, destination = _written(case.files, directory), directory / "out"
    before = sorted(path.name for path in directory.iterdir())
    result = _attempt(directory, lambda: convert(source, destination, **case.options))
    if isinstance(result, HfMegatronError) or case.options["dry_run"]:
        left = sorted(path.name for path in directory.iterdir())
        if left != before:
            raise FindError("a refused conversion leaves something behind", f"{left}: {result}")
        return not isinstance(result, HfMegatronError)
    written = _attempt(directory, lambda: read_model(destination))
    if isinstance(written, HfMegatronError):
        raise FindError(f"what was written is refused: {type(written).__name__}", str(written)[:1000])
    sizes = {
        path.relative_to(destination).as_posix(): path.stat().st_size
        for path in destination.rglob("*")
        if path.is_file()
    }
    if sizes != dict(result.files):
        raise FindError("other files than were announced", f"{sizes} is not {dict(result.files)}")
    leaked = [path.name for path in destination.iterdir() if path.is_file() and directories.SECRET in path.read_bytes()]
    if leaked:
        raise FindError("a file from outside of the source is in the result", str(leaked))
    return True


def _check_verify(files: directories.Files, directory: Path) -> bool:
    source = _written(files, directory)
    directories.write(directories.hub_seeds()["hub"], directory / "whole")
    return not isinstance(_attempt(directory, lambda: verify(directory / "whole", source)), HfMegatronError)


def _any_directory() -> st.SearchStrategy[directories.Files]:
    return st.one_of(models.hub_directories(), models.megatron_directories())


# --- Training checkpoints and adapters.


def _check_training(files: directories.Files, directory: Path) -> bool:
    from hf_megatron.training import optimizer_state, training_state
    from tests.fuzz import training

    source, state = _written(files, directory), training.fresh()
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

    source, model = _written(files, directory), training.small_model()
    return not isinstance(_attempt(directory, lambda: load_adapter(model, source)), HfMegatronError)


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


def _healthy_conversion(kind: str, **options: Any) -> ConvertCase:
    files = directories.hub_seeds()[kind] if kind in directories.hub_seeds() else directories.megatron_seed(kind)
    return ConvertCase(files, {"to": "hub", "dry_run": False, **options})


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
        Reader("inspect", _any_directory, _check_inspect, lambda: directories.hub_seeds()["bin"]),
        Reader(
            "dry-run",
            lambda: _conversions(_any_directory(), True),
            _check_convert,
            lambda: _healthy_conversion("tp", dry_run=True),
        ),
        Reader(
            "convert-hub",
            lambda: _conversions(models.hub_directories(), False),
            _check_convert,
            lambda: _healthy_conversion("bin", to="tp", tp_size=2),
        ),
        Reader(
            "convert-megatron",
            lambda: _conversions(models.megatron_directories(), False),
            _check_convert,
            lambda: _healthy_conversion("megatron"),
        ),
        Reader("verify", _any_directory, _check_verify, lambda: directories.hub_seeds()["tp"]),
        Reader("training", _training_cases, _check_training, lambda: _healthy_training("checkpoint")),
        Reader("adapter", _adapter_cases, _check_adapter, lambda: _healthy_training("adapter")),
    )
}
