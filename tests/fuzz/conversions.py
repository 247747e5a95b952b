"""Checks of what reads whole checkpoints: ``inspect``, ``convert`` and ``verify``."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from hf_megatron.checkpoint.distributed import METADATA, open_tensor, read_index
from hf_megatron.checkpoint.torch_file import TENSOR_GLOBALS
from hf_megatron.errors import CheckpointError, HfMegatronError
from hf_megatron_conversion import convert, inspect, verify
from hf_megatron_conversion.formats import read_model
from hf_megatron_conversion.formats.megatron_core.containers import torch_dist_directory
from hf_megatron_conversion.formats.megatron_core.reader import _INDEX_GLOBALS
from hf_megatron_conversion.formats.megatron_lm.pickled import MEGATRON_GLOBALS
from hf_megatron_conversion.tensors import raw_bytes
from tests.conversion.megatron_lm.generator import VOCAB
from tests.fuzz import directories, distributed, models
from tests.fuzz.checks import FindError, require_harmless
from tests.fuzz.guard import watched
from tests.fuzz.lookups import Lookups, lookups_of, torch_lookups
from tests.fuzz.pickles import Draw, pick


def attempt(case_directory: Path, act: Callable[[], object]) -> Any:
    """What a call returns, or the error of ours that it raises."""
    with watched(case_directory):
        try:
            return act()
        except HfMegatronError as error:
            result = error
    str(result).encode("utf-8", "replace")
    return result


def written(files: directories.Files, directory: Path) -> Path:
    """The directory with these files, and beside it one with a secret."""
    (directory / "secret").write_bytes(directories.SECRET)
    directories.write(files, directory / "source")
    return directory / "source"


def any_directory() -> st.SearchStrategy[directories.Files]:
    """A checkpoint of any format."""
    return st.one_of(models.hub_directories(), models.megatron_directories(), distributed.core_directories())


def check_inspect(files: directories.Files, directory: Path) -> bool:
    """What ``inspect`` accepts holds nothing that runs."""
    source = written(files, directory)
    result = attempt(directory, lambda: inspect(source))
    if isinstance(result, HfMegatronError):
        return False
    if result.format == "hub":
        for path in read_model(source).files:
            if path.suffix == ".bin":
                require_harmless(torch_lookups(path), TENSOR_GLOBALS)
    elif result.container == "torch_dist":
        _require_harmless_records(torch_dist_directory(source), directory / "record")
    return True


def _require_harmless_records(place: Path, record_path: Path) -> None:
    index = (place / METADATA).read_bytes()
    require_harmless(lookups_of(lambda: Lookups(io.BytesIO(index)).load()), _INDEX_GLOBALS)
    for record in read_index(place, _INDEX_GLOBALS).records:
        with record.path.open("rb") as file:
            file.seek(record.start)
            record_path.write_bytes(file.read(record.length))
        require_harmless(torch_lookups(record_path), MEGATRON_GLOBALS)


@dataclass(frozen=True)
class ConvertCase:
    """A checkpoint, and the options of ``convert``."""

    files: directories.Files
    options: dict[str, Any]


@st.composite
def conversions(draw: Draw, sources: st.SearchStrategy[directories.Files], dry_run: bool) -> ConvertCase:
    """A conversion that may be impossible."""
    files = draw(sources)
    options: dict[str, Any] = {"to": pick(draw, ["hub", "tp", "megatron-lm", "megatron-core"]), "dry_run": dry_run}
    if options["to"] == "megatron-core":
        options["container"] = pick(draw, [None, "torch_dist", "torch", "torch"])
        options["pp_size"] = pick(draw, [None, None, 1, 2, 3])
        options["transformer_impl"] = pick(draw, [None, None, "local", "transformer_engine"])
        if options["container"] != "torch" and draw(st.booleans()):  # which is not cut
            options = {**options, "pp_size": None, "transformer_impl": None}
    if options["to"] in ("tp", "megatron-lm") or options.get("container") == "torch":
        options["tp_size"] = pick(draw, [2, 2, 1, 4, 3, None])
    options["dtype"] = pick(draw, [None, None, None, "bfloat16", "float64"])
    options["max_shard_size"] = pick(draw, [None, None, None, "2KB", 10**4])
    options["vocab_size"] = pick(draw, [None, VOCAB, 131])
    options["model_type"] = pick(draw, [None, None, "stock", "megatron"])
    return ConvertCase(files, {name: value for name, value in options.items() if value is not None})


def check_convert(case: ConvertCase, directory: Path) -> bool:
    """What is converted is readable and of the source alone; what is refused leaves nothing."""
    source, destination = written(case.files, directory), directory / "out"
    before = sorted(path.name for path in directory.iterdir())
    result = attempt(directory, lambda: convert(source, destination, **case.options))
    if isinstance(result, HfMegatronError) or case.options["dry_run"]:
        left = sorted(path.name for path in directory.iterdir())
        if left != before:
            raise FindError("a refused conversion leaves something behind", f"{left}: {result}")
        return not isinstance(result, HfMegatronError)
    read = attempt(directory, lambda: read_model(destination))
    if isinstance(read, HfMegatronError):
        raise FindError(f"what was written is refused: {type(read).__name__}", str(read)[:1000])
    paths = {path.relative_to(destination).as_posix(): path for path in destination.rglob("*") if path.is_file()}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    if sizes != dict(result.files):
        raise FindError("other files than were announced", f"{sizes} is not {dict(result.files)}")
    if leaked := [name for name, path in paths.items() if directories.SECRET in path.read_bytes()]:
        raise FindError("a file from outside of the source is in the result", str(leaked))
    return True


def check_convert_core(case: ConvertCase, directory: Path) -> bool:
    """The same, and torch itself reads the same from a distributed checkpoint that was converted."""
    if not check_convert(case, directory):
        return False
    place = torch_dist_directory(directory / "source")
    _require_harmless_records(place, directory / "record")
    tensors, expected = {}, {}
    for name, stored in read_index(place, _INDEX_GLOBALS).tensors.items():
        try:
            tensor = open_tensor(stored, MEGATRON_GLOBALS)
        except CheckpointError:  # an optimizer's, which is not converted
            continue
        if tensor.nbytes < 10**6:
            tensors[name] = tensor.read()
            expected[name] = torch.empty_like(tensors[name])
    try:
        dcp.load(expected, storage_reader=dcp.FileSystemReader(place), no_dist=True)
    except (Exception, CheckpointException):  # torch checks more; its own exception is a BaseException
        return True
    for name, read in tensors.items():
        if not torch.equal(raw_bytes(read), raw_bytes(expected[name])):
            raise FindError("another tensor than torch reads", f"{name} is {read!r}, torch has {expected[name]!r}")
    return True


def check_verify(files: directories.Files, directory: Path) -> bool:
    """``verify`` compares, or refuses."""
    source = written(files, directory)
    directories.write(directories.hub_seeds()["hub"], directory / "whole")
    return not isinstance(attempt(directory, lambda: verify(directory / "whole", source)), HfMegatronError)


def healthy_conversion(kind: str, **options: Any) -> ConvertCase:
    """The conversion of an undamaged checkpoint."""
    if kind in directories.hub_seeds():
        files = directories.hub_seeds()[kind]
    else:
        files = distributed.core_seed(kind) if kind in distributed.SEEDS else directories.megatron_seed(kind)
    return ConvertCase(files, {"to": "hub", "dry_run": False, **options})
