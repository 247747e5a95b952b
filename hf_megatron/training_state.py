"""What a training run needs to go on where it stopped, written so that any layout can read it.

A checkpoint directory holds the model (a ``tp`` directory if the model is cut, else a Hub directory), ``optimizer/`` in
torch's distributed format under parameter names, ``scheduler.pt``, one random state per data-parallel rank and
``trainer_state.json``.

Whatever carries the name of a checkpoint is one: it is written under a hidden name and renamed when complete, and
renamed before it is deleted. What a run that was killed has left under hidden names the next run removes.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed
from transformers.trainer_utils import sort_checkpoints

from hf_megatron.errors import CheckpointIncompleteError
from hf_megatron.models.layout import barrier, one_process_allowed

__all__ = [
    "OPTIMIZER_DIRECTORY",
    "begin_checkpoint",
    "finish_checkpoint",
    "load_optimizer",
    "load_random_state",
    "remove_old_checkpoints",
    "save_optimizer",
    "save_random_state",
    "tidy_checkpoints",
]

OPTIMIZER_DIRECTORY = "optimizer"

# The names below, and what save_pretrained puts beside the directory it is given.
_HIDDEN = re.compile(r"\.+checkpoint-\d+\..+")


def tidy_checkpoints(run_directory: Path, *, is_first: bool) -> None:
    """Remove what a run that was killed has left; every rank must call it, before it looks for checkpoints."""
    if is_first and run_directory.is_dir():
        for path in [path for path in run_directory.iterdir() if _HIDDEN.fullmatch(path.name)]:
            checkpoint = path.with_name(path.stem.lstrip("."))
            if path.suffix == ".old" and not checkpoint.exists():  # killed while this one was about to be replaced
                path.rename(checkpoint)
            else:
                shutil.rmtree(path, ignore_errors=True)
    barrier()


def begin_checkpoint(destination: Path, *, is_first: bool) -> Path:
    """An empty directory beside ``destination`` to write a checkpoint into; every rank must call it.

    The name is hidden, so that nothing takes the directory for a checkpoint before it is one.
    """
    fresh = destination.with_name(f".{destination.name}.incomplete")
    if is_first:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    barrier()
    return fresh


def finish_checkpoint(fresh: Path, destination: Path, *, is_first: bool) -> None:
    """Give a complete checkpoint its name, once all ranks have written their part; every rank must call it."""
    barrier()
    if is_first:
        old = destination.with_name(f".{destination.name}.old")
        if destination.exists():
            destination.rename(old)
        fresh.rename(destination)
        shutil.rmtree(old, ignore_errors=True)
    barrier()


def remove_old_checkpoints(run_directory: Path, limit: int | None, best: str | None) -> None:
    """Keep the ``limit`` newest checkpoints, of which the best one is one, as Trainer's ``save_total_limit`` asks."""
    checkpoints = [Path(path) for path in sort_checkpoints(str(run_directory), use_mtime=True)]
    if not limit or limit < 0 or len(checkpoints) <= limit:
        return
    kept = {checkpoints[-1]} | ({Path(best)} if best is not None else set())
    surplus = len(checkpoints) - max(limit, len(kept))
    for path in [path for path in checkpoints if path not in kept][:surplus]:
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.deleted")), ignore_errors=True)


def save_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Save the optimizer's state under parameter names, each rank its own part; every rank must call it."""
    with one_process_allowed(), _without_empty_groups(optimizer):
        save_optimizer_distributed(model, optimizer, str(directory / OPTIMIZER_DIRECTORY))


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Load what :func:`save_optimizer` wrote, at any layout; every rank must call it.

    Raises:
        CheckpointIncompleteError: There is no optimizer state.
    """
    path = directory / OPTIMIZER_DIRECTORY
    if not (path / ".metadata").is_file():
        raise CheckpointIncompleteError(
            f"{directory} holds no optimizer state ({OPTIMIZER_DIRECTORY}/ is missing: was it saved with "
            "save_only_model=True?). To go on with a fresh optimizer, load the model from it and start anew."
        )
    # With gradients in place torch takes the optimizer for one that has stepped, and silently restores nothing.
    model.zero_grad(set_to_none=True)
    with one_process_allowed(), _without_empty_groups(optimizer):
        load_optimizer_distributed(model, optimizer, str(path))


@contextmanager
def _without_empty_groups(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Hide parameter groups without parameters, at which torch raises an IndexError; an adapter has no biases, say."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        filled = iter(optimizer.param_groups)
        optimizer.param_groups = [next(filled) if group["params"] else group for group in groups]


def save_random_state(directory: Path, data_parallel_rank: int) -> None:
    """Save this process's random streams; one process of each tensor-parallel group calls it, as theirs are equal."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, _random_state_file(directory, data_parallel_rank))


def load_random_state(directory: Path, data_parallel_rank: int) -> bool:
    """Restore the random streams of a data-parallel rank; returns whether the checkpoint had them."""
    path = _random_state_file(directory, data_parallel_rank)
    if not path.is_file():
        return False
    with torch.serialization.safe_globals(_NUMPY_GLOBALS):
        state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    return True


# What numpy's random state is pickled with.
_NUMPY_GLOBALS: list[Any] = [
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
]


def _random_state_file(directory: Path, data_parallel_rank: int) -> Path:
    return directory / f"random_state_{data_parallel_rank}.pt"
