"""Tensors in another layout than they are stored in: places of their files, in another order, and padding."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_megatron.checkpoint import LazyTensor, itemsize, torch_dtype
from hf_megatron.partition import Box
from hf_megatron_conversion.tensors import Cast, Readable, Reshaped

if TYPE_CHECKING:
    import torch


def viewed(tensor: Readable, view: Callable[[LazyTensor], LazyTensor]) -> Readable:
    """``view`` of a stored tensor, which is cast afterwards if it is to be cast."""
    if isinstance(tensor, Cast):
        return replace(tensor, tensor=viewed(tensor.tensor, view))
    assert isinstance(tensor, LazyTensor), f"{tensor} is stored nowhere"
    return view(tensor)


def transposed(tensor: Readable) -> Readable:
    """A matrix [m, n] as [n, m]."""
    return viewed(tensor, LazyTensor.transposed)


def narrowed(tensor: Readable, dim: int, start: int, stop: int) -> Readable:
    """Entries ``start`` to ``stop`` of a tensor along ``dim``."""
    return viewed(tensor, lambda stored: stored.narrowed(dim, start, stop))


class _ReadInto:
    """``read`` for what has ``read_into``."""

    def read(self: Readable, box: Box | None = None) -> torch.Tensor:
        import torch

        box = Box.whole(self.shape) if box is None else box
        result = torch.empty(box.shape, dtype=torch_dtype(self.dtype))
        self.read_into(result.view(-1).view(torch.uint8).numpy().data, box)
        return result


@dataclass(frozen=True)
class Filled(_ReadInto):
    """A tensor of one value, stored nowhere."""

    dtype: str
    shape: tuple[int, ...]
    fill: float = 0.0

    def read_into(self, memory: memoryview, box: Box) -> None:
        memory[:] = _bytes_of(self.fill, self.dtype) * box.numel


@dataclass(frozen=True)
class Bytes(_ReadInto):
    """A tensor of known bytes, stored nowhere."""

    data: bytes
    dtype: str = "U8"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.data),)

    def read_into(self, memory: memoryview, box: Box) -> None:
        memory[:] = self.data[box.offset[0] : box.offset[0] + box.shape[0]]


@dataclass(frozen=True)
class Padded(_ReadInto):
    """``rows`` rows of a tensor [n, ...] from ``start`` on; those from n on are ``fill``."""

    tensor: Readable
    start: int
    rows: int
    fill: float = 0.0

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, *self.tensor.shape[1:]

    def read_into(self, memory: memoryview, box: Box) -> None:
        first, last = self.start + box.offset[0], self.start + box.offset[0] + box.shape[0]
        stored = box.narrowed(0, first, max(first, min(last, self.tensor.shape[0])))
        size = stored.numel * itemsize(self.dtype)
        if stored.numel:
            self.tensor.read_into(memory[:size], stored)
        memory[size:] = _bytes_of(self.fill, self.dtype) * (box.numel - stored.numel)


def stacked(parts: Sequence[Readable], head_dim: int) -> Reshaped:
    """Queries, keys and values of some heads, one head's after the other: 3 x [n * d, ...] to [n * 3 * d, ...]."""
    rows, *rest = parts[0].shape
    if isinstance(parts[0], Cast):
        inner = stacked([part.tensor for part in parts if isinstance(part, Cast)], head_dim)
        return replace(inner, tensor=replace(parts[0], tensor=inner.tensor))
    pieces = []
    for which, part in enumerate(parts):
        assert isinstance(part, LazyTensor)
        for piece in part.pieces:
            offset, size = piece.box.offset, piece.box.shape
            # Heads that are stored in two pieces are cut into three: the whole heads, and what is before and after.
            for head, row, heads, length in _whole_heads(offset[0], size[0], head_dim):
                stored = Box((head * head_dim + row, *offset[1:]), (heads * length, *size[1:]))
                some = piece.part(stored, itemsize(part.dtype))
                assert some is not None
                step, *steps = some.steps
                box = Box((head, which, row, *offset[1:]), (heads, 1, length, *size[1:]))
                pieces.append(replace(some, box=box, strides=(step * head_dim, 0, step, *steps)))
    first = parts[0]
    assert isinstance(first, LazyTensor)
    shape = (rows // head_dim, 3, head_dim, *rest)
    return Reshaped(LazyTensor(first.name, first.dtype, shape, tuple(pieces)), (3 * rows, *rest))


def _whole_heads(start: int, size: int, head_dim: int) -> list[tuple[int, int, int, int]]:
    """Rows as blocks of heads: (first head, first row in it, number of heads, rows of each)."""
    blocks = []
    stop = start + size
    while start < stop:
        head, row = divmod(start, head_dim)
        is_whole = row == 0 and stop - start >= head_dim
        heads = (stop - start) // head_dim if is_whole else 1
        length = head_dim if is_whole else min(head_dim - row, stop - start)
        blocks.append((head, row, heads, length))
        start += heads * length
    return blocks


def _bytes_of(value: float, dtype: str) -> bytes:
    """One element."""
    if value == 0.0:
        return bytes(itemsize(dtype))
    if dtype != "BF16":
        return struct.pack({"F64": "<d", "F32": "<f", "F16": "<e"}[dtype], value)
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)  # to the nearest, ties to even
