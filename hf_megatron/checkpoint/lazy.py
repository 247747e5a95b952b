"""Tensors that stay on disk until a part of them is asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING

from hf_megatron.checkpoint.safetensors_header import itemsize, torch_dtype
from hf_megatron.errors import CheckpointIncompleteError
from hf_megatron.partition import Box

if TYPE_CHECKING:
    import torch


# A longer run is read straight into the tensor; of a shorter one this much is read, which serves the next ones too.
_BUFFER_BYTES = 8192
# Of runs shorter than this everything between the first and the last is read at once.
_MIN_RUN_BYTES = 64
# What lies in one run is read to many places at once, if they are not too short: the kernel takes so many, and a system
# call at most 2 GB.
_MIN_SCATTERED_BYTES = 512
_MAX_TARGETS = 1024
_MAX_SCATTERED_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a full tensor and where its bytes lie: in ``[data_start, data_stop)`` of the file ``path``.

    They lie row-major, or ``strides`` says how many elements apart two neighbours along each dimension are. A pickle
    may hold a view of a larger tensor, and Megatron-LM has orders of its own.
    """

    path: Path
    box: Box
    data_start: int
    data_stop: int
    strides: tuple[int, ...] | None = None


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
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

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
        result = torch.empty(box.shape, dtype=torch_dtype(self.dtype))
        self.read_into(_memory(result), box)
        return result

    def read_into(self, memory: memoryview, box: Box) -> None:
        """Read the part of the full tensor inside ``box``.

        Args:
            memory: Where to, row-major; it has exactly the bytes of the part.
            box: In coordinates of the full tensor; may be empty.

        Raises:
            CheckpointIncompleteError: The file became shorter since it was opened.
        """
        assert len(box.shape) == len(self.shape), f"{self.name}: {box} is not a box of {self.shape}"
        item, strides = itemsize(self.dtype), _row_major(box.shape)
        for piece in self.pieces:
            if (common := piece.box.intersection(box)) is None:
                continue
            first = sum(i * stride for i, stride in zip(_relative(common, box).offset, strides, strict=True))
            runs, size = _runs(strides, common.shape)
            if size == common.numel:
                self._read_piece(piece, common, memory[first * item : (first + size) * item])
            elif _MIN_SCATTERED_BYTES <= size * item <= _MAX_SCATTERED_BYTES and _is_one_run(piece, common):
                targets = (memory[(first + run) * item : (first + run + size) * item] for run in runs)
                self._scatter(piece, common, targets, size * item)
            else:
                self._read_and_copy(piece, common, memory, box)

    def extent(self, box: Box) -> tuple[Path, int, int] | None:
        """Where the bytes of ``box`` lie, row-major and without a gap: file, first byte, and one past the last.

        None if they do not.
        """
        for piece in self.pieces:
            if box.numel and piece.box.intersection(box) == box and _is_one_run(piece, box):
                start = self._start(piece, box)
                return piece.path, start, start + box.numel * itemsize(self.dtype)
        return None

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

    def _start(self, piece: Piece, box: Box) -> int:
        """The byte of the file at which the part of a piece inside ``box`` starts."""
        offset = zip(_relative(box, piece.box).offset, _strides(piece), strict=True)
        return piece.data_start + itemsize(self.dtype) * sum(i * stride for i, stride in offset)

    def _scatter(self, piece: Piece, box: Box, targets: Iterator[memoryview], size: int) -> None:
        """Read a part that lies in one run to many places, each of ``size`` bytes, without a copy in between."""
        position = self._start(piece, box)
        count = min(_MAX_TARGETS, _MAX_SCATTERED_BYTES // size)
        with piece.path.open("rb", buffering=0) as file:
            while some := list(islice(targets, count)):
                if os.preadv(file.fileno(), some, position) != size * len(some):
                    raise self._shorter(piece.path)
                position += size * len(some)

    def _read_and_copy(self, piece: Piece, part: Box, memory: memoryview, box: Box) -> None:
        """Read a part of a piece, and copy it to its place in the memory of ``box``."""
        import torch

        dtype = torch_dtype(self.dtype)
        copy = torch.empty(part.shape, dtype=dtype)
        self._read_piece(piece, part, _memory(copy))
        torch.frombuffer(memory, dtype=dtype).view(box.shape)[_relative(part, box).slices] = copy

    def _read_piece(self, piece: Piece, box: Box, target: memoryview) -> None:
        """Read the part of a piece inside ``box`` into memory, row-major."""
        strides, item, start = _strides(piece), itemsize(self.dtype), self._start(piece, box)
        runs, size = _runs(strides, box.shape)
        size *= item
        with io.BufferedReader(io.FileIO(piece.path), _BUFFER_BYTES) as file:
            if size < _MIN_RUN_BYTES and strides != _row_major(piece.box.shape):
                self._read_span(file, start, strides, box.shape, target)
                return
            position = 0
            for run in runs:
                self._read_into(file, start + item * run, target[position : position + size])
                position += size

    def _read_span(
        self,
        file: io.BufferedReader[io.FileIO],
        start: int,
        strides: tuple[int, ...],
        shape: tuple[int, ...],
        target: memoryview,
    ) -> None:
        """Read everything from the first element to the last, and pick the elements that are wanted."""
        import torch

        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        everything = torch.empty(span, dtype=torch_dtype(self.dtype))
        self._read_into(file, start, _memory(everything))
        target[:] = _memory(everything.as_strided(shape, strides).contiguous())

    def _read_into(self, file: io.BufferedReader[io.FileIO], start: int, target: memoryview) -> None:
        file.seek(start)
        if file.readinto(target) != len(target):
            raise self._shorter(file.name)

    def _shorter(self, path: object) -> CheckpointIncompleteError:
        return CheckpointIncompleteError(f"{path} became shorter while {self.name} was read.")


def _relative(box: Box, origin: Box) -> Box:
    """``box`` in coordinates that start at the first element of ``origin``."""
    return Box(tuple(a - b for a, b in zip(box.offset, origin.offset, strict=True)), box.shape)


def _strides(piece: Piece) -> tuple[int, ...]:
    return piece.strides or _row_major(piece.box.shape)


def _is_one_run(piece: Piece, box: Box) -> bool:
    """Whether the part of a piece inside ``box`` lies row-major and without a gap."""
    return _runs(_strides(piece), box.shape)[1] == box.numel


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    import torch

    memory: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return memory


def _runs(strides: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Iterator[int], int]:
    """Where the contiguous runs start that make up a box of ``shape``, in order, and their length, in elements."""
    # Trailing dimensions whose elements follow each other belong to the run; the first one that has gaps ends it.
    size, inner = 1, len(shape)
    while inner and (strides[inner - 1] == size or shape[inner - 1] == 1):
        size *= shape[inner - 1]
        inner -= 1
    indices = product(*(range(n) for n in shape[:inner]))
    return (sum(i * stride for i, stride in zip(index, strides, strict=False)) for index in indices), size
