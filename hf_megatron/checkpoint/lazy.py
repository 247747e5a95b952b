"""Lazy tensors: only the requested slices are read from disk."""

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


# Read buffer. Longer contiguous runs are read straight into the tensor; shorter ones share a buffered read.
_BUFFER_BYTES = 8192
# For runs shorter than this, read the whole span from the first to the last run at once.
_MIN_RUN_BYTES = 64
# One ``preadv`` call scatters a contiguous run into up to 1,024 buffers (IOV_MAX), unless they are very short. Linux
# limits a system call to 2 GB.
_MIN_SCATTERED_BYTES = 512
_MAX_TARGETS = 1024
_MAX_SCATTERED_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a full tensor and where its bytes lie: in ``[data_start, data_stop)`` of the file ``path``.

    The bytes are row-major unless ``strides`` (in elements) are given: a pickle may contain a view of a larger tensor,
    and Megatron-LM orders queries, keys and values differently.
    """

    path: Path
    box: Box
    data_start: int
    data_stop: int
    strides: tuple[int, ...] | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides; row-major if none are given."""
        return self.strides or _row_major(self.box.shape)

    def is_one_run(self, box: Box) -> bool:
        """Whether the part inside ``box`` is row-major and contiguous."""
        return _runs(self.steps, box.shape)[1] == box.numel

    def start(self, box: Box, item: int) -> int:
        """The byte of the file at which the part inside ``box`` starts, of elements of ``item`` bytes."""
        return self.data_start + item * _distance(box, self.box, self.steps)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A full tensor of a checkpoint, stored whole or in pieces; reading a slice reads only the bytes of that slice.

    Every read opens the file anew, so that an instance may be read from several threads, and sent to another process.
    It has what transformers' loader uses of safetensors' slices: ``get_shape``, ``get_dtype`` and indexing.
    """

    name: str  # as stored
    dtype: str  # in safetensors' spelling ("F32", "BF16")
    shape: tuple[int, ...]  # of the full tensor
    pieces: tuple[Piece, ...]  # where its parts lie, which tile the shape; one if it is stored whole

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensor."""
        return self.numel * itemsize(self.dtype)

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The part inside ``box`` (default: all of it; may be empty), as a contiguous CPU tensor of its own."""
        import torch

        box = Box.whole(self.shape) if box is None else box
        result = torch.empty(box.shape, dtype=torch_dtype(self.dtype))
        self.read_into(_memory(result), box)
        return result

    def read_into(self, memory: memoryview, box: Box) -> None:
        """Read the part inside ``box`` into memory of exactly its bytes, row-major.

        CheckpointIncompleteError if the file became shorter since it was opened.
        """
        assert len(box.shape) == len(self.shape), f"{self.name}: {box} is not a box of {self.shape}"
        item, strides = itemsize(self.dtype), _row_major(box.shape)
        for piece in self.pieces:
            if (part := piece.box.intersection(box)) is None:
                continue
            first = _distance(part, box, strides)
            runs, size = _runs(strides, part.shape)
            if size == part.numel:
                self._read_part(piece, part, memory[first * item : (first + size) * item])
            elif _MIN_SCATTERED_BYTES <= size * item <= _MAX_SCATTERED_BYTES and piece.is_one_run(part):
                targets = (memory[(first + run) * item : (first + run + size) * item] for run in runs)
                self._scatter(piece, part, targets, size * item)
            else:
                self._copy_part(piece, part, memory, strides, first)

    def extent(self, box: Box) -> tuple[Path, int, int] | None:
        """Where the bytes of ``box`` lie, row-major and without a gap: file, first byte, one past the last; or None."""
        for piece in self.pieces:
            if box.numel and piece.box.intersection(box) == box and piece.is_one_run(box):
                start = piece.start(box, itemsize(self.dtype))
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

    def _scatter(self, piece: Piece, box: Box, targets: Iterator[memoryview], size: int) -> None:
        """Read a contiguous part into many buffers of ``size`` bytes each, without an intermediate copy."""
        position = piece.start(box, itemsize(self.dtype))
        count = min(_MAX_TARGETS, _MAX_SCATTERED_BYTES // size)
        with piece.path.open("rb", buffering=0) as file:
            while some := list(islice(targets, count)):
                if os.preadv(file.fileno(), some, position) != size * len(some):
                    raise self._shorter(piece.path)
                position += size * len(some)

    def _copy_part(self, piece: Piece, part: Box, memory: memoryview, strides: tuple[int, ...], first: int) -> None:
        """Read a part of a piece and copy it into strided memory that starts at element ``first``."""
        import torch

        dtype = torch_dtype(self.dtype)
        copy = torch.empty(part.shape, dtype=dtype)
        self._read_part(piece, part, _memory(copy))
        torch.frombuffer(memory, dtype=dtype).as_strided(part.shape, strides, first).copy_(copy)

    def _read_part(self, piece: Piece, part: Box, target: memoryview) -> None:
        """Read a part of a piece into memory, row-major."""
        strides, item, start = piece.steps, itemsize(self.dtype), piece.start(part, itemsize(self.dtype))
        runs, size = _runs(strides, part.shape)
        with io.BufferedReader(io.FileIO(piece.path), _BUFFER_BYTES) as file:
            if size * item < _MIN_RUN_BYTES and strides != _row_major(piece.box.shape):
                # Read the whole span from the first element to the last, then pick the wanted ones.
                import torch

                span = 1 + sum((n - 1) * stride for n, stride in zip(part.shape, strides, strict=True))
                everything = torch.empty(span, dtype=torch_dtype(self.dtype))
                self._fill(file, start, _memory(everything))
                target[:] = _memory(everything.as_strided(part.shape, strides).contiguous())
                return
            for index, run in enumerate(runs):
                self._fill(file, start + item * run, target[index * size * item : (index + 1) * size * item])

    def _fill(self, file: io.BufferedReader[io.FileIO], start: int, target: memoryview) -> None:
        file.seek(start)
        if file.readinto(target) != len(target):
            raise self._shorter(file.name)

    def _shorter(self, path: object) -> CheckpointIncompleteError:
        return CheckpointIncompleteError(f"{path} became shorter while {self.name} was read.")


def _distance(box: Box, origin: Box, strides: tuple[int, ...]) -> int:
    """Offset in elements from the start of ``origin`` to the start of ``box``."""
    return sum((a - b) * stride for a, b, stride in zip(box.offset, origin.offset, strides, strict=True))


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    import torch

    memory: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return memory


def _runs(strides: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Iterator[int], int]:
    """Start of each contiguous run in a box of ``shape``, in order, and their common length, in elements."""
    # Trailing dimensions that are contiguous belong to the run; the first one with gaps ends it.
    size, inner = 1, len(shape)
    while inner and (strides[inner - 1] == size or shape[inner - 1] == 1):
        size *= shape[inner - 1]
        inner -= 1
    indices = product(*(range(n) for n in shape[:inner]))
    return (sum(i * stride for i, stride in zip(index, strides, strict=False)) for index in indices), size
