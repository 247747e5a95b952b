"""How one tensor is divided over the ranks of a tensor-parallel group.

A *spec* answers, for a full shape, a degree and a rank, which boxes of the full tensor the rank holds. It is pure
arithmetic: no process group, no I/O, and no torch until a tensor is actually split or merged. Sizes need not divide:
they are cut as ``torch.chunk`` cuts them, so every rank but the last ones holds ``ceil(size / tp_size)``.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3 (the cuts); Paszke et al., ``torch.chunk`` (uneven sizes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from hf_megatron.errors import PartitionError

if TYPE_CHECKING:
    import torch


Shape = tuple[int, ...]


def chunk_range(size: int, num_chunks: int, index: int) -> tuple[int, int]:
    """Half-open range of chunk ``index`` when ``size`` items are cut as ``torch.chunk`` cuts them.

    Unlike ``torch.chunk`` this always speaks of ``num_chunks`` chunks; the ones past the end are empty.
    """
    chunk = -(-size // num_chunks)
    return min(index * chunk, size), min((index + 1) * chunk, size)


@dataclass(frozen=True, slots=True)
class Box:
    """A contiguous, axis-aligned part of a full tensor: where it starts and how large it is, per dimension."""

    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that covers a full tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this box into the full tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    def narrowed(self, dim: int, start: int, stop: int) -> Box:
        """This box with dimension ``dim`` restricted to full-tensor coordinates ``[start, stop)``."""
        offset, shape = list(self.offset), list(self.shape)
        offset[dim], shape[dim] = start, stop - start
        return Box(tuple(offset), tuple(shape))

    def intersection(self, other: Box) -> Box | None:
        """The part both boxes cover, or None if they do not overlap. Zero-dimensional boxes are one element."""
        starts = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        stops = [
            min(a + size_a, b + size_b)
            for a, size_a, b, size_b in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        ]
        if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
            return None
        return Box(tuple(starts), tuple(stop - start for start, stop in zip(starts, stops, strict=True)))


class Spec(ABC):
    """How one tensor is cut. Instances are immutable and compare by value."""

    @abstractmethod
    def boxes(self, shape: Shape, tp_size: int, tp_rank: int) -> tuple[Box, ...]:
        """Parts of the full tensor that ``tp_rank`` holds, in the order in which it keeps them along ``dim``."""

    @abstractmethod
    def stored_boxes(self, shape: Shape, tp_size: int) -> tuple[Box, ...]:
        """Contiguous boxes in which a ``tp`` directory stores the tensor; together they tile ``shape``."""

    @abstractmethod
    def merge(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor from all ranks' shards, in rank order; the inverse of :meth:`split`."""

    def check(self, name: str, shape: Shape, tp_size: int) -> None:  # noqa: B027 (whole tensors fit any degree)
        """Raise PartitionError if the tensor called ``name`` cannot be cut for ``tp_size`` ranks."""

    def shard_shape(self, shape: Shape, tp_size: int, tp_rank: int) -> Shape:
        """Shape of the piece that ``tp_rank`` holds."""
        boxes = self.boxes(shape, tp_size, tp_rank)
        if len(boxes) == 1:
            return boxes[0].shape
        dim = next(d for d in range(len(shape)) if boxes[0].offset[d] != boxes[1].offset[d])
        first = list(boxes[0].shape)
        first[dim] = sum(box.shape[dim] for box in boxes)
        return tuple(first)

    def split(self, tensor: torch.Tensor, tp_size: int) -> list[torch.Tensor]:
        """Every rank's shard of a full tensor, in rank order. Shards may be views of ``tensor``."""
        return [self.shard(tensor, tp_size, rank) for rank in range(tp_size)]

    def shard(self, tensor: torch.Tensor, tp_size: int, tp_rank: int) -> torch.Tensor:
        """One rank's shard of a full tensor; a view where the shard is contiguous in the full tensor."""
        import torch

        boxes = self.boxes(tuple(tensor.shape), tp_size, tp_rank)
        if len(boxes) == 1:
            return tensor[boxes[0].slices]
        dim = next(d for d in range(tensor.dim()) if boxes[0].offset[d] != boxes[1].offset[d])
        return torch.cat([tensor[box.slices] for box in boxes], dim=dim)


@dataclass(frozen=True, slots=True)
class Replicated(Spec):
    """Every rank holds the whole tensor.

    ``used`` names the cut of the part a rank computes with, where that is less than what it holds (GPT-2's fused
    query-key-value bias). The gradient of such a tensor is a partial sum until it has been all-reduced.
    """

    used: Spec | None = None

    def boxes(self, shape: Shape, tp_size: int, tp_rank: int) -> tuple[Box, ...]:
        return (Box.whole(shape),)

    def stored_boxes(self, shape: Shape, tp_size: int) -> tuple[Box, ...]:
        return (Box.whole(shape),)

    def merge(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rank 0's copy: all are equal."""
        return shards[0]


@dataclass(frozen=True, slots=True)
class Split(Spec):
    """Rank ``r`` holds the ``r``-th chunk along ``dim``."""

    dim: int

    def boxes(self, shape: Shape, tp_size: int, tp_rank: int) -> tuple[Box, ...]:
        return (Box.whole(shape).narrowed(self.dim, *chunk_range(shape[self.dim], tp_size, tp_rank)),)

    def stored_boxes(self, shape: Shape, tp_size: int) -> tuple[Box, ...]:
        boxes = [self.boxes(shape, tp_size, rank)[0] for rank in range(tp_size)]
        return tuple(box for box in boxes if box.numel)

    def merge(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return torch.cat(list(shards), dim=self.dim)

    def check(self, name: str, shape: Shape, tp_size: int) -> None:
        size = shape[self.dim]
        start, stop = chunk_range(size, tp_size, tp_size - 1)
        if start == stop:
            raise PartitionError(
                f"{name} has {size} entries along dim {self.dim}; cut over tp_size={tp_size} ranks the last rank would "
                f"hold none. Choose fewer."
            )


@dataclass(frozen=True, slots=True)
class VocabSplit(Split):
    """Rank ``r`` holds the ``r``-th chunk of the vocabulary, without padding: 50257 over 4 is 3 x 12565 and 12562."""

    dim: int = 0


@dataclass(frozen=True, slots=True)
class FusedSplit(Spec):
    """``num_blocks`` tensors lie side by side along ``dim``, and each of them is cut on its own.

    GPT-2's ``c_attn`` is ``Q | K | V``; rank ``r`` holds ``Q_r | K_r | V_r``, which is not one box of the full tensor.
    """

    dim: int
    num_blocks: int

    def boxes(self, shape: Shape, tp_size: int, tp_rank: int) -> tuple[Box, ...]:
        whole = Box.whole(shape)
        if tp_size == 1:
            return (whole,)
        block = shape[self.dim] // self.num_blocks
        start, stop = chunk_range(block, tp_size, tp_rank)
        return tuple(whole.narrowed(self.dim, i * block + start, i * block + stop) for i in range(self.num_blocks))

    def stored_boxes(self, shape: Shape, tp_size: int) -> tuple[Box, ...]:
        """One contiguous chunk per rank, as transformers' distributed checkpoints store it."""
        return Split(self.dim).stored_boxes(shape, tp_size)

    def merge(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        blocks = [shard.chunk(self.num_blocks, dim=self.dim) for shard in shards]
        return torch.cat([blocks[r][i] for i in range(self.num_blocks) for r in range(len(shards))], dim=self.dim)

    def check(self, name: str, shape: Shape, tp_size: int) -> None:
        size = shape[self.dim]
        if size % self.num_blocks:
            raise PartitionError(
                f"{name} has {size} entries along dim {self.dim}, which is not {self.num_blocks} blocks of equal size."
            )
        block_shape = list(shape)
        block_shape[self.dim] = size // self.num_blocks
        Split(self.dim).check(name, tuple(block_shape), tp_size)
