"""Lazy tensors: only the requested slices are read from disk."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from hf_megatron.checkpoint.file_identity import FileIdentity, open_unchanged
from hf_megatron.checkpoint.gather import FileReader, gather
from hf_megatron.checkpoint.mapping import ALIGNMENT, MappedFiles
from hf_megatron.checkpoint.safetensors_header import itemsize, torch_dtype
from hf_megatron.partition import Box

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a full tensor and where its bytes lie: in ``[data_start, data_stop)`` of the file ``path``.

    The bytes are row-major unless ``strides`` (in elements) are given: a pickle may contain a view of a larger tensor,
    and Megatron-LM orders queries, keys and values differently. ``identity`` is the file's when the piece was made.
    """

    path: Path
    box: Box
    data_start: int
    data_stop: int
    strides: tuple[int, ...] | None = None
    identity: FileIdentity | None = None

    def __post_init__(self) -> None:
        if self.identity is None and self.path.exists():
            object.__setattr__(self, "identity", FileIdentity.of(self.path))

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides; row-major if none are given."""
        return self.strides or _row_major(self.box.shape)

    @property
    def is_dense(self) -> bool:
        """Whether its elements lie in row-major order without a gap."""
        dims = zip(self.box.shape, self.steps, _row_major(self.box.shape), strict=True)
        return all(size == 1 or step == dense for size, step, dense in dims)

    def part(self, box: Box, item: int) -> Piece | None:
        """The part inside ``box``, of elements of ``item`` bytes; None if there is none."""
        part = self.box.intersection(box)
        if part is None:
            return None
        steps = self.steps
        start = self.data_start + item * sum(
            (a - b) * step for a, b, step in zip(part.offset, self.box.offset, steps, strict=True)
        )
        last = sum((size - 1) * step for size, step in zip(part.shape, steps, strict=True))
        return Piece(self.path, part, start, start + (1 + last) * item, steps, self.identity)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A full tensor of a checkpoint, stored whole or in pieces; reading a slice reads only the bytes of that slice.

    Every read opens the file anew, so that an instance may be read from several threads, and sent to another process.
    A file that was changed since the tensor was found in it is a CheckpointIncompleteError. It has what transformers'
    loader uses of safetensors' slices: ``get_shape``, ``get_dtype`` and indexing.
    """

    name: str  # as stored
    dtype: str  # in safetensors' spelling ("F32", "BF16")
    shape: tuple[int, ...]  # of the full tensor
    pieces: tuple[Piece, ...]  # where its parts lie, which tile the shape; one if it is stored whole
    mapped: MappedFiles | None = field(default=None, compare=False, repr=False)  # where parts may stay, if anywhere

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensor."""
        return self.numel * itemsize(self.dtype)

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The part inside ``box`` (default: all of it; may be empty), as a contiguous CPU tensor of its own.

        If it may stay in its file, and lies there in one piece, its memory is that of the mapped file.
        """
        import torch

        box = Box.whole(self.shape) if box is None else box
        if (view := self._mapped_view(box)) is not None:
            return view
        result = torch.empty(box.shape, dtype=torch_dtype(self.dtype))
        self.read_into(result.reshape(-1).view(torch.uint8).numpy().data, box)
        return result

    def _mapped_view(self, box: Box) -> torch.Tensor | None:
        import torch

        item = itemsize(self.dtype)
        part = next((part for piece in self.pieces if (part := piece.part(box, item)) is not None), None)
        if self.mapped is None or part is None or part.box != box or part.data_start % ALIGNMENT or not part.is_dense:
            return None
        with closing(FileReader(part.path, open_unchanged(part.path, part.identity))) as file:
            mapping = self.mapped.of(file)
        if mapping is None:
            return None
        dtype = torch_dtype(self.dtype)
        return torch.frombuffer(mapping, dtype=dtype, count=box.numel, offset=part.data_start).view(box.shape)

    def read_into(self, memory: memoryview, box: Box) -> None:
        """Read the part inside ``box`` into memory of exactly its bytes, row-major."""
        import numpy as np

        assert len(box.shape) == len(self.shape), f"{self.name}: {box} is not a box of {self.shape}"
        if not box.numel:
            return
        item = itemsize(self.dtype)
        result: Any = np.frombuffer(memory, f"u{item}").reshape(box.shape)
        file: FileReader | None = None
        try:
            for piece in self.pieces:
                if (part := piece.part(box, item)) is None:
                    continue
                if file is None or file.path != part.path:
                    if file is not None:
                        file.close()
                    file = FileReader(
                        part.path, open_unchanged(part.path, part.identity), may_map=self.mapped is not None
                    )
                place = Box(tuple(a - b for a, b in zip(part.box.offset, box.offset, strict=True)), part.box.shape)
                strides = tuple(item * step for step in part.steps)
                gather(file, part.data_start, strides, result[(*place.slices, ...)])
        finally:
            if file is not None:
                file.close()

    def transposed(self) -> LazyTensor:
        """The same elements with the order of dimensions reversed: [m, n] becomes [n, m]."""
        pieces = (
            Piece(
                piece.path,
                Box(piece.box.offset[::-1], piece.box.shape[::-1]),
                piece.data_start,
                piece.data_stop,
                piece.steps[::-1],
                piece.identity,
            )
            for piece in self.pieces
        )
        return LazyTensor(self.name, self.dtype, self.shape[::-1], tuple(pieces))

    def narrowed(self, dim: int, start: int, stop: int) -> LazyTensor:
        """Entries ``start`` to ``stop`` along ``dim``."""
        box = Box.whole(self.shape).narrowed(dim, start, stop)
        parts = (piece.part(box, itemsize(self.dtype)) for piece in self.pieces)
        pieces = tuple(
            replace(part, box=part.box.narrowed(dim, first - start, first - start + part.box.shape[dim]))
            for part in parts
            if part is not None
            for first in [part.box.offset[dim]]
        )
        return LazyTensor(self.name, self.dtype, box.shape, pieces)

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


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
