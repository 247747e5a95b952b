"""Where the tensors of a Megatron-core checkpoint lie, and in which container: by the names of files, and one of them.

The directory that is given may be the root of a training run, one iteration, or what NeMo puts around one.
"""

from __future__ import annotations

from pathlib import Path

from hf_megatron.checkpoint import read_json
from hf_megatron.checkpoint.distributed import METADATA
from hf_megatron.errors import CheckpointError, CheckpointFormatError, CheckpointIncompleteError, shown
from hf_megatron_conversion.formats.megatron_lm.iterations import has_iterations, latest_iteration

MARK = "metadata.json"
_BACKEND = "sharded_backend"
_COMMON = "common.pt"
_NEMO = ("weights", "model_weights")  # of NeMo 2 and NeMo 1
# Megatron-core read it until 0.15.
_ZARR_REMEDY = (
    "Start its training script with Megatron-LM of core 0.15 or older and --ckpt-convert-format torch_dist "
    "--ckpt-convert-save DIR, which writes DIR/torch_dist and ends"
)
# Megatron-LM has no tool for it; torch's own keeps the arguments too.
_FSDP_REMEDY = (
    "It was saved with --ckpt-format fsdp_dtensor or torch_dcp. If you trust it, since this runs its pickles: python "
    "-m torch.distributed.checkpoint.format_utils dcp_to_torch {place} NEW/iter_0000001/mp_rank_00/model_optim_rng.pt "
    "(make that directory first), and convert NEW"
)


def is_distributed(directory: Path) -> bool:
    """Whether a directory is, or has as its latest iteration, a distributed checkpoint of Megatron-core."""
    if not directory.is_dir():
        return False
    try:
        return _place(directory) is not None
    except CheckpointError:
        return False


def torch_dist_directory(directory: Path) -> Path:
    """The directory in which ``.metadata`` lies.

    Raises:
        CheckpointFormatError: It is in a container that is not read here.
        CheckpointIncompleteError: Parts of it are missing.
    """
    place = _place(directory)
    assert place is not None, f"{directory} is no distributed checkpoint"
    mark = place / MARK
    if not mark.is_file():
        if (place / METADATA).is_file() and not (place / _COMMON).is_file():
            remedy = _FSDP_REMEDY.format(place=place)
            raise CheckpointFormatError(f"{place} is a distributed checkpoint without {MARK}. {remedy}.")
        raise CheckpointIncompleteError(f"{mark} is missing, which says how the checkpoint is stored.")
    content = read_json(mark)
    backend = content.get(_BACKEND)
    if backend != "torch_dist":
        remedy = _ZARR_REMEDY if backend == "zarr" else "Save it with --ckpt-format torch_dist"
        raise CheckpointFormatError(
            f"{place} is a checkpoint of Megatron-core in the container {shown(backend)}, which is not read here (only "
            f"torch_dist and torch). {remedy}."
        )
    if not (place / METADATA).is_file():
        raise CheckpointIncompleteError(f"{place / METADATA} is missing, which says where the tensors lie.")
    return place


def _place(directory: Path) -> Path | None:
    """The directory with the tensors; None if there is no distributed checkpoint."""
    candidates = [directory, *(directory / name for name in _NEMO)]
    if has_iterations(directory):
        latest = latest_iteration(directory)
        candidates += [latest, *(latest / name for name in _NEMO)]
    return next(filter(_has_tensors, candidates), None)


def _has_tensors(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    mark = directory / MARK
    if mark.is_file():
        try:
            return _BACKEND in read_json(mark)
        except CheckpointError:
            return any((directory / name).exists() for name in (METADATA, _COMMON))
    has_data = (directory / METADATA).is_file() and any(directory.glob("*.distcp"))
    return has_data or (directory / _COMMON).is_file()
