"""The optimizer's state, in torch's distributed format, read without running what its files may hold.

torch itself unpickles ``.metadata``, and every entry that is not a tensor, and does whatever they ask for. So
``.metadata`` is read as data first and refused if it names more than a checkpoint's metadata needs, and entries are
loaded as weights only.

Source: ``filesystem.FileSystemReader`` and ``default_planner.DefaultLoadPlanner`` of ``torch.distributed.checkpoint``.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers.distributed.checkpoint import _redistribute_state_dict

from hf_megatron.checkpoint.budgets import RESUME_FACTOR
from hf_megatron.checkpoint.distributed import METADATA, read_metadata
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, DestinationError
from hf_megatron.models.processes import one_process_allowed
from hf_megatron.models.saving import reasons

OPTIMIZER_DIRECTORY = "optimizer"

# What numpy's random state, and its scalars, are pickled with.
_RECONSTRUCT: Any = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
_SAFE_NUMPY = [_RECONSTRUCT, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def load_weights_only(source: Any) -> Any:
    """What ``torch.save`` has written: tensors and plain data, and what numpy's random state consists of."""
    with torch.serialization.safe_globals(_SAFE_NUMPY):
        return torch.load(source, map_location="cpu", weights_only=True)


def save_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Save the optimizer state by parameter name, each rank its own shards; every rank must call it."""
    write_optimizer_state(optimizer_state(model, optimizer), directory)


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This rank's shards of the state, by parameter name; every rank must call it."""
    with one_process_allowed(), _without_empty_groups(optimizer):
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        state: dict[str, Any] = _redistribute_state_dict(get_optimizer_state_dict(model, optimizer, options=options))
    return state


def write_optimizer_state(state: dict[str, Any], directory: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write what :func:`optimizer_state` returned; every rank of the group must call it."""
    path = directory / OPTIMIZER_DIRECTORY
    try:
        with one_process_allowed():
            dcp.save({"optimizer": state}, checkpoint_id=str(path), process_group=group)
    except CheckpointException as error:
        raise DestinationError(f"{path}: {reasons(error)}") from error


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Load what :func:`save_optimizer` wrote, at any layout; every rank must call it."""
    path = directory / OPTIMIZER_DIRECTORY
    if not (path / METADATA).is_file():
        raise CheckpointIncompleteError(
            f"{directory} holds no optimizer state ({OPTIMIZER_DIRECTORY}/ is missing: was it saved with "
            "save_only_model=True?). To go on with a fresh optimizer, load the model from it and start anew."
        )
    reader = _Reader(path)
    # If gradients exist, torch assumes that the optimizer has stepped and silently restores nothing.
    model.zero_grad(set_to_none=True)
    try:
        with one_process_allowed(), _without_empty_groups(optimizer):
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            reference = get_optimizer_state_dict(model, optimizer, options=options)
            state = _redistribute_state_dict(reference)
            dcp.load({"optimizer": state}, storage_reader=reader, planner=_Planner())
            state = _redistribute_state_dict(state, reference_state_dict=reference)
            set_optimizer_state_dict(model, optimizer, state, options=options)
    except CheckpointException as error:
        raise CheckpointFormatError(f"{path} cannot be read: {reasons(error)}") from error


class _Reader(dcp.FileSystemReader):
    """torch's reader, with metadata that was judged before it is unpickled."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        remedy = " Resume from another checkpoint."
        _, self._judged = read_metadata(directory / METADATA, factor=RESUME_FACTOR, remedy=remedy)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata = pickle.loads(self._judged)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(dcp.DefaultLoadPlanner):
    """torch's planner, which loads what is not a tensor as weights only."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        buffer = io.BytesIO()
        torch.save(load_weights_only(value), buffer)  # plain data by now
        buffer.seek(0)
        super().load_bytes(read_item, buffer)


@contextmanager
def _without_empty_groups(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Hide empty parameter groups, for which torch raises an IndexError (an adapter may have no biases)."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        filled = iter(optimizer.param_groups)
        optimizer.param_groups = [next(filled) if group["params"] else group for group in groups]
