"""How a run begins: anew or from a checkpoint, in a directory that all ranks see."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch.distributed as dist
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from hf_megatron.errors import CheckpointError, DestinationError, ParallelStateError
from hf_megatron.models.processes import gather_objects, is_first_rank, share_failure
from hf_megatron.training.training_state import verify_checkpoint

logger = logging.get_logger(__name__)

_T = TypeVar("_T")

_REFUSED = ".start-refused"


def from_first_rank(make: Callable[[], _T]) -> _T:
    """What ``make`` returns on rank 0, on every rank; every rank must call it, and all raise an error of rank 0's.

    Collective: broadcast over all processes of the pickled result.
    """
    made: list[_T | None] = [None]
    error = None
    if is_first_rank():
        try:
            made[0] = make()
        except Exception as caught:
            error = caught
    share_failure(error)
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]


def where_to_start(output_dir: str | os.PathLike[str], *, resume: bool = False) -> str | None:
    """What to give to ``train(resume_from_checkpoint=...)`` in a script that ``torchrun`` may restart.

    Args:
        output_dir: Where the run keeps its checkpoints.
        resume: Whether the user wants to go on with what is there.

    Returns:
        ``"auto"`` if the user wants it, or if ``torchrun`` has restarted the script; otherwise None, a fresh start.

    Raises:
        DestinationError: It would be a fresh start into a directory with checkpoints; on the other ranks
            ParallelStateError. ``torchrun`` then restarts the script, which is refused too.
    """
    directory = Path(output_dir)
    # An agent counts the failures of its own ranks only, and the others restart theirs along with it.
    restarts = gather_objects(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))

    def decide() -> str | None:
        mark = directory / _REFUSED
        checkpoints = sort_checkpoints(str(directory)) if directory.is_dir() else []
        if resume or (any(restarts) and not mark.exists()) or not checkpoints:
            mark.unlink(missing_ok=True)
            return "auto" if resume or any(restarts) else None
        mark.touch()
        raise DestinationError(
            f"{directory} has checkpoints of an earlier run, the last of them {Path(checkpoints[-1]).name}. To go on "
            "from there, add --resume; to begin anew, choose another directory or delete them."
        )

    return from_first_rank(decide)


def require_shared_directory(directory: Path) -> None:
    """DestinationError on all ranks if some do not see what rank 0 writes into the directory.

    Collective: all-gather over all processes of a file's name, and of who sees it.
    """

    def create() -> str:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f".{uuid4().hex}.seen-by-all"
        path.touch()
        return path.name

    name = from_first_rank(create)
    seen = gather_objects((directory / name).exists())
    if is_first_rank():
        (directory / name).unlink()
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise DestinationError(
            f"ranks {blind} do not see what rank 0 writes to {directory}, and a checkpoint is one directory that all "
            "ranks write to and read from. Give all of them the same output directory, on a file system that the nodes "
            'share; or train without checkpoints (save_strategy="no").'
        )


def newest_intact_checkpoint(run_directory: Path) -> Path | None:
    """The newest checkpoint that is as it was written, or None if there is none at all; every rank must call it.

    Those that are damaged are passed over with a warning.

    Raises:
        CheckpointError: All are damaged, or ParallelStateError on ranks where another one has seen it.
    """
    paths = from_first_rank(lambda: sort_checkpoints(str(run_directory)) if run_directory.is_dir() else [])
    failure: Exception | None = None
    for path in map(Path, reversed(paths)):
        try:
            verify_checkpoint(path)
            return path
        except (CheckpointError, ParallelStateError) as error:
            logger.warning(f"{path} is passed over. {error}")
            failure = failure or error
    if failure is not None:
        raise failure
    return None
