"""Tensors that stay on disk until a part of them is asked for."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING

from hf_megatron.checkpoint.safetensors_header import itemsize, torch_dtype
from hf_megatron.errors import CheckpointIncompleteError
from hf_megatron.partition import Box

if TYPE_CHECKING:
    import torch

__all__ = ["LazyTensor", "Piece"]

# A longer run is read straight into the tensor; of a shorter one this much is read, which serves the next ones too.
_BUFFER_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a full tensor and where its bytes lie, row-major: ``[data_start, data_stop)`` of the file ``path``.

    Of a tensor in a pickle only the number of bytes is known; ``data_start`` is 0.
    """

    path: Path
    box: Box
    data_start: int
    data_stop: int


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """One full tensor of a checkpoint, whether stored whole or in pieces; reading a slice reads that slice only.

    Every read opens the file anew, so an instance holds no file handle, may be read from several threads at once, and
    may be sent to another process. It also speaks the part of safetensors' slice protocol that transformers' loader
    uses (``get_shape``, ``get_dtype``, indexing), so it can take such a slice's place in a state dict.

    Attributes:
        name: Name as stored.
        dtype: In safetensors' spelling (``"F32"``, ``"BF16"``).
        shape: The full tensor's shape.
        pieces: Where its parts lie; they tile the shape. A tensor stored whole is one piece.
        source: The tensor itself, mapped from the file, where it comes from a pickle and its bytes have no known
            place; None otherwise.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    source: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensor."""
        return self.numel * itemsize(self.dtype)

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The part of the full tensor inside ``box`` (default: all of it), as a contiguous CPU tensor of its own.

        Args:
            box: In coordinates of the full tensor; may be empty.

        Returns:
            A tensor of shape ``box.shape`` that shares memory with nothing.

        Raises:
            CheckpointIncompleteError: The file became shorter since it was opened.
        """
        import torch

        if box is None:
            box = Box.whole(self.shape)
        assert len(box.shape) == len(self.shape), f"{self.name}: {box} is not a box of {self.shape}"
        if self.source is not None:
            return self.source[box.slices].clone(memory_format=torch.contiguous_format)
        parts = [(piece, common) for piece in self.pieces if (common := piece.box.intersection(box)) is not None]
        if len(parts) == 1:
            return self._read_piece(*parts[0])
        result = torch.empty(box.shape, dtype=torch_dtype(self.dtype))
        for piece, common in parts:
            result[_relative(common, box).slices] = self._read_piece(piece, common)
        return result

    def get_shape(self) -> list[int]:
        """Shape of the full tensor, as safetensors' slices give it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Dtype, as safetensors' slices give it."""
        return self.dtype

    def __getitem__(self, index: EllipsisType | slice | tuple[EllipsisType | slice, ...]) -> torch.Tensor:
        """Read a slice: ``...``, a slice, or a tuple of slices that may end in ``...``; steps are not offered."""
        items = index if isinstance(index, tuple) else (index,)
        slices = items[:-1] if items and items[-1] is Ellipsis else items
        if len(slices) > len(self.shape):
            raise IndexError(f"{self.name} of shape {list(self.shape)} has fewer dimensions than the index {index}.")
        offset, shape = [0] * len(self.shape), list(self.shape)
        for dim, item in enumerate(slices):
            # TypeError, because IndexError would make iteration over a tensor silently yield nothing.
            if not isinstance(item, slice) or item.step not in (None, 1):
                raise TypeError(f"{self.name} can be read by slices without a step, not at {index}.")
            start, stop, _ = item.indices(self.shape[dim])
            offset[dim], shape[dim] = start, max(stop - start, 0)
        return self.read(Box(tuple(offset), tuple(shape)))

    def _read_piece(self, piece: Piece, box: Box) -> torch.Tensor:
        import torch

        result = torch.empty(box.shape, dtype=torch_dtype(self.dtype))
        target = result.reshape(-1).view(torch.uint8).numpy().data
        position = 0
        with io.BufferedReader(io.FileIO(piece.path), _BUFFER_BYTES) as file:
            for start, size in _runs(piece.box.shape, _relative(box, piece.box), itemsize(self.dtype)):
                file.seek(piece.data_start + start)
                if file.readinto(target[position : position + size]) != size:
                    raise CheckpointIncompleteError(f"{piece.path} became shorter while {self.name} was read.")
                position += size
        return result


def _relative(box: Box, origin: Box) -> Box:
    """``box`` in coordinates that start at the first element of ``origin``."""
    return Box(tuple(a - b for a, b in zip(box.offset, origin.offset, strict=True)), box.shape)


def _runs(shape: tuple[int, ...], box: Box, item: int) -> Iterator[tuple[int, int]]:
    """Contiguous byte runs (start, size) that make up ``box`` of a row-major tensor of ``shape``, in order."""
    # Trailing dimensions that are taken whole extend the run; the first one that is not ends it.
    inner = len(shape)
    while inner and box.shape[inner - 1] == shape[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)
    strides = [item * prod(shape[dim + 1 :]) for dim in range(len(shape))]
    size = item * prod(box.shape[inner:])
    tail = sum(box.offset[dim] * strides[dim] for dim in range(inner, len(shape)))
    outer = [range(box.offset[dim], box.offset[dim] + box.shape[dim]) for dim in range(inner)]
    for index in product(*outer):
        yield tail + sum(i * stride for i, stride in zip(index, strides, strict=False)), size
