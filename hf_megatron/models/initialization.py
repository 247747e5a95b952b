"""Weight initialization that does not depend on the layout.

Each parameter has its own generator, seeded by (seed, parameter name). A rank draws the full parameter block by block
and keeps its shard. The same seed therefore gives bit-identical weights at any tensor-parallel degree, with or without
FSDP, and for any head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from types import EllipsisType

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed.sharding_utils import DtensorShardOperation

_BLOCK_ELEMENTS = 2**22  # 16 MiB of float32; changing it changes the weights that a seed gives

_requested_seed: ContextVar[int | None] = ContextVar("requested_seed", default=None)


@contextmanager
def initialization_seed(seed: int | None) -> Iterator[None]:
    """Context in which new models draw their weights from ``seed``, or ``torch.initial_seed()`` if None."""
    token = _requested_seed.set(seed)
    try:
        yield
    finally:
        _requested_seed.reset(token)


def seed_of_first_rank(device: torch.device) -> int:
    """The seed for weights, that of rank 0.

    Collective: broadcast over the world of one integer, if a process group exists.
    """
    seed = local_seed()
    if dist.is_initialized() and dist.get_world_size() > 1:
        value = torch.tensor(seed, device=device)
        dist.broadcast(value, 0)
        seed = int(value)
    return seed


def local_seed() -> int:
    """The seed for weights in this process: the given one or ``torch.initial_seed()``."""
    requested = _requested_seed.get()
    return (torch.initial_seed() if requested is None else requested) % 2**63


def fill_normal(parameter: torch.Tensor, std: float, seed: int, name: str, *, zero_row: int | None = None) -> None:
    """Fill a parameter, or this rank's shard of it, from N(0, std) in place.

    Its name in the base model makes its stream its own. ``zero_row`` of the full tensor is zero instead: an embedding's
    padding token.
    """
    drawn = _DrawnTensor(tuple(parameter.shape), std, seed, name, zero_row)
    if isinstance(parameter, DTensor):
        target = parameter.to_local()
        target.copy_(DtensorShardOperation(parameter).shard_tensor(drawn, device=target.device, dtype=target.dtype))
    else:
        parameter.copy_(drawn[...])


class _DrawnTensor:
    """A tensor drawn lazily when it is read, with the interface of a safetensors slice."""

    def __init__(self, shape: tuple[int, ...], std: float, seed: int, name: str, zero_row: int | None) -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self.shape, self.std, self.zero_row = shape, std, zero_row
        self.seed = int.from_bytes(digest[:8], "little") % 2**63

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: EllipsisType | tuple[slice, ...]) -> torch.Tensor:
        """Draw block by block and keep only the requested ``index``."""
        index = (slice(None),) * len(self.shape) if isinstance(index, EllipsisType) else index
        rows, columns = index[0], index[1:]
        start, stop, _ = rows.indices(self.shape[0])
        kept = []
        for first, block in self._blocks():
            inside = slice(max(start - first, 0), max(min(stop - first, block.shape[0]), 0))
            if inside.start < inside.stop:
                kept.append(block[(inside, *columns)].clone())
        return torch.cat(kept) if kept else torch.empty(0, *self.shape[1:])[(slice(None), *columns)]

    def _blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, block of rows) in order; float32 on the CPU, so that every device gets the same numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        num_rows = max(1, _BLOCK_ELEMENTS // max(1, prod(self.shape[1:])))
        for first in range(0, self.shape[0], num_rows):
            shape = (min(num_rows, self.shape[0] - first), *self.shape[1:])
            block = torch.empty(shape, dtype=torch.float32).normal_(0.0, self.std, generator=generator)
            if self.zero_row is not None and first <= self.zero_row < first + shape[0]:
                block[self.zero_row - first] = 0.0
            yield first, block
