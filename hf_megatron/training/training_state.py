"""The state needed to resume a training run, stored so that any layout can load it.

A checkpoint directory contains the model (a ``tp`` directory if it is sharded, else a Hub directory), ``optimizer/`` in
torch's distributed format under parameter names, ``scheduler.pt``, one random state per data-parallel rank and
``trainer_state.json``.

A directory with the name of a checkpoint is always complete: it is written as an :class:`AtomicDirectory` and renamed
before it is deleted. ``checksums.json`` in it is verified before a run is resumed.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerState
from transformers.optimization import GreedyLR
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from hf_megatron.checkpoint import AtomicDirectory
from hf_megatron.checkpoint.atomic_directory import recover, remove
from hf_megatron.checkpoint.budgets import MAX_TRAINER_STATE_BYTES, require_within
from hf_megatron.checkpoint.checksums import CHECKSUMS, compute_checksums, damages, read_checksums, write_checksums
from hf_megatron.checkpoint.regular_file import open_regular
from hf_megatron.errors import CheckpointError, CheckpointFormatError, CheckpointIncompleteError, shown
from hf_megatron.models.processes import barrier, gather_objects, is_first_rank, share_failure
from hf_megatron.training.optimizer_state import load_weights_only

logger = logging.get_logger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"

_HIDDEN = re.compile(r"\.(checkpoint-\d+)\.incomplete")


def tidy_checkpoints(run_directory: Path, *, is_first: bool) -> None:
    """Remove what a killed run left behind; every rank must call it before looking for checkpoints."""
    if is_first and run_directory.is_dir():
        names = [_HIDDEN.fullmatch(path.name) for path in run_directory.iterdir()]
        for name in {found[1] for found in names if found is not None}:
            recover(run_directory / name)
    barrier()


def finish_checkpoint(directory: AtomicDirectory, group: dist.ProcessGroup | None = None) -> None:
    """Publish a checkpoint once all ranks have written their part; every rank must call it.

    Collective: all-gather over all processes of the checksums, of which each rank computes some.
    """
    barrier(group)
    parts = gather_objects(compute_checksums(directory.path, *_share()), group)
    if is_first_rank():
        write_checksums(directory.path, {name: checksum for part in parts for name, checksum in part.items()})
    directory.publish()


def verify_checkpoint(directory: Path) -> None:
    """See that a checkpoint is as it was written (``checksums``, :func:`check_step`); every rank must call it.

    Collective: all-gather over all processes of what each rank has found in its share of the files.
    """
    error: CheckpointError | None = None
    found: list[str] = []
    try:
        _require_files(directory)
        checksums = read_checksums(directory)
        if checksums is None:
            logger.warning_once(f"{directory} has no {CHECKSUMS}: its files are not verified.")
        else:
            found = damages(directory, checksums, *_share())
        check_step(directory)
    except CheckpointError as caught:
        error = caught
    found = [damage for part in gather_objects(found) for damage in part]
    if found:
        raise CheckpointIncompleteError(
            f"{directory} is damaged: {'; '.join(found)}. Resume from another checkpoint. If a file was changed on "
            f"purpose, delete {CHECKSUMS}."
        )
    share_failure(error)


def _require_files(directory: Path) -> None:
    """See that no pipe or device is among the files, which to open could take forever."""
    for path in directory.rglob("*"):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointFormatError(f"{path} is neither a file nor a directory. Resume from another checkpoint.")


def check_step(directory: Path) -> None:
    """See that ``trainer_state.json`` is there, and is that of the step in the directory's name."""
    path = directory / TRAINER_STATE_NAME
    if not path.is_file():
        raise CheckpointIncompleteError(f"{path} is missing: {directory} is no training checkpoint, or not whole.")
    try:
        # Not read_json: the number of floating-point operations may have more than 64 bits.
        require_within(MAX_TRAINER_STATE_BYTES, path.stat().st_size, "bytes")
        step = TrainerState.load_from_json(str(path)).global_step
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointFormatError(f"{path} cannot be read: {error}") from None
    named = re.fullmatch(r"checkpoint-(\d+)", directory.name)
    if named is not None and int(named[1]) != step:
        raise CheckpointFormatError(
            f"{path} is of step {shown(step)}, and the directory's name says {named[1]}. Give the directory the name "
            "it had, or resume from another checkpoint."
        )


def last_usable_checkpoint(run_directory: Path, unusable: Path | None = None) -> Path | None:
    """The newest checkpoint whose files all exist with the recorded sizes, except one known to be unusable."""
    checkpoints = sort_checkpoints(str(run_directory)) if run_directory.is_dir() else []
    for path in map(Path, reversed(checkpoints)):
        if unusable is not None and path.absolute() == unusable.absolute():
            continue
        try:
            check_step(path)
            checksums = read_checksums(path)
            if checksums is None or not damages(path, checksums, sizes_only=True):
                return path
        except (CheckpointError, OSError):  # another rank may be removing one
            continue
    return None


def _share() -> tuple[int, int]:
    """This rank's share of the files: (index, number of shares)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def remove_old_checkpoints(run_directory: Path, limit: int | None, best: str | None) -> None:
    """Keep the ``limit`` newest checkpoints and the best one, as Trainer's ``save_total_limit`` specifies."""
    checkpoints = [Path(path) for path in sort_checkpoints(str(run_directory), use_mtime=True)]
    if not limit or limit < 0 or len(checkpoints) <= limit:
        return
    kept = {checkpoints[-1]} | ({Path(best)} if best is not None else set())
    surplus = len(checkpoints) - max(limit, len(kept))
    for path in [path for path in checkpoints if path not in kept][:surplus]:
        remove(path)


def load_scheduler(scheduler: Any, directory: Path, *, step: int, may_skip: bool) -> None:
    """Restore the learning rate's schedule, which does not count steps that overflow, if such are skipped."""
    state = read_state(directory / "scheduler.pt")
    if not isinstance(state, dict):
        raise CheckpointFormatError(f"{directory / 'scheduler.pt'} holds no state of a schedule.")
    place = state.get("last_epoch")
    follows_metrics = isinstance(scheduler, (torch.optim.lr_scheduler.ReduceLROnPlateau, GreedyLR))
    if isinstance(place, int) and not follows_metrics and (place > step or (place < step and not may_skip)):
        raise CheckpointFormatError(
            f"{directory / 'scheduler.pt'} is of step {place}, and {TRAINER_STATE_NAME} of step {step}: they are of "
            "two checkpoints. Resume from another one."
        )
    try:
        scheduler.load_state_dict(state)
    except Exception as error:  # whatever torch makes of it
        raise CheckpointFormatError(
            f"{directory / 'scheduler.pt'} holds no state of a {type(scheduler).__name__}: {type(error).__name__}: "
            f"{shown(str(error))}. Resume from another checkpoint."
        ) from error


def read_state(path: Path) -> Any:
    """What ``torch.save`` has written, tensors and plain data alone."""
    if not path.is_file():
        raise CheckpointIncompleteError(f"{path} is missing. Resume from another checkpoint.")
    try:
        with open_regular(path) as file:
            return load_weights_only(file)
    except Exception as error:
        raise CheckpointFormatError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def save_random_state(directory: Path, data_parallel_rank: int) -> None:
    """Save this process's random streams; one process of each tensor-parallel group calls it, as theirs are equal."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, directory / f"random_state_{data_parallel_rank}.pt")


def load_random_state(directory: Path, data_parallel_rank: int) -> bool:
    """Restore the random streams of a data-parallel rank; returns whether the checkpoint had them."""
    path = directory / f"random_state_{data_parallel_rank}.pt"
    if not path.is_file():
        return False
    state = read_state(path)
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.random.set_rng_state(state["cpu"])
        if torch.cuda.is_available() and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RuntimeError) as error:
        raise CheckpointFormatError(f"{path} holds no state of random streams: {shown(str(error))}.") from error
    return True
