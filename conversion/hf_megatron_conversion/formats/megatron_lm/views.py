"""Tensors in another layout than they are stored in, read by slices."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_megatron.checkpoint import itemsize, torch_dtype
from hf_megatron.partition import Box
from hf_megatron_conversion.tensors import Readable

if TYPE_CHECKING:
    import torch


# What lies in runs of this length is read run by run; of shorter ones everything is read.
_MIN_RUN_BYTES = 4096


class Memo:
    """The last tensor that had to be made as a whole, kept for its other slices. All views of a model share one."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._value: torch.Tensor | None = None

    def get(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor of this key, made now unless it is the last one."""
        if self._key != key or self._value is None:
            self._value = None  # before the next one is made, so that there are never two
            self._value = make()
            self._key = key
        return self._value


@dataclass(frozen=True)
class _View:
    """Of a tensor, with the dtype that this has."""

    tensor: Readable

    @property
    def dtype(self) -> str:
        return self.tensor.dtype


@dataclass(frozen=True)
class Transposed(_View):
    """A matrix with rows and columns exchanged: [m, n] as stored becomes [n, m].

    ``memo`` keeps the columns that were read last, where they lie in short runs: whoever writes the matrix reads the
    same ones for each slice.
    """

    memo: Memo = field(compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.tensor.shape
        return columns, rows

    def read(self, box: Box | None = None) -> torch.Tensor:
        box = Box.whole(self.shape) if box is None else box
        (start, first), (size, width) = box.offset, box.shape
        if size * itemsize(self.dtype) >= _MIN_RUN_BYTES:
            return self.tensor.read(Box((first, start), (width, size))).t().contiguous()
        stored = Box((first, 0), (width, self.shape[0]))
        key = (id(self.tensor), first, width)
        whole = self.memo.get(key, lambda: self.tensor.read(stored).t().contiguous())
        return whole[start : start + size]


def narrowed(tensor: Readable, dim: int, start: int, stop: int) -> Readable:
    """Entries ``start`` to ``stop`` of a tensor along ``dim``; of a transposed one, no others are transposed."""
    if isinstance(tensor, Transposed):
        return Transposed(narrowed(tensor.tensor, 1 - dim, start, stop), tensor.memo)
    return Boxed(tensor, Box.whole(tensor.shape).narrowed(dim, start, stop))


@dataclass(frozen=True)
class Boxed(_View):
    """A box of a tensor."""

    box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        return self.box.shape

    def read(self, box: Box | None = None) -> torch.Tensor:
        box = Box.whole(self.shape) if box is None else box
        offset = tuple(a + b for a, b in zip(self.box.offset, box.offset, strict=True))
        return self.tensor.read(Box(offset, box.shape))


@dataclass(frozen=True)
class Padded(_View):
    """``rows`` rows of a tensor [n, ...] from ``start`` on; those from n on are ``fill``."""

    start: int
    rows: int
    fill: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, *self.tensor.shape[1:]

    def read(self, box: Box | None = None) -> torch.Tensor:
        import torch

        box = Box.whole(self.shape) if box is None else box
        first, last = self.start + box.offset[0], self.start + box.offset[0] + box.shape[0]
        stop = min(last, self.tensor.shape[0])
        if stop == last:
            return self.tensor.read(box.narrowed(0, first, last))
        result = torch.full(box.shape, self.fill, dtype=torch_dtype(self.dtype))
        if stop > first:
            result[: stop - first] = self.tensor.read(box.narrowed(0, first, stop))
        return result


@dataclass(frozen=True)
class Stacked:
    """Queries, keys and values of some heads, one head's after the other: 3 x [n * d, ...] to [n * 3 * d, ...].

    ``memo`` keeps the result.
    """

    tensors: Sequence[Readable]
    head_dim: int
    memo: Memo = field(compare=False, repr=False)

    @property
    def dtype(self) -> str:
        return self.tensors[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *rest = self.tensors[0].shape
        return 3 * rows, *rest

    def read(self, box: Box | None = None) -> torch.Tensor:
        box = Box.whole(self.shape) if box is None else box
        return self.memo.get(id(self), self._make)[box.slices].contiguous()

    def _make(self) -> torch.Tensor:
        import torch

        parts = [tensor.read() for tensor in self.tensors]
        heads = [part.reshape(-1, self.head_dim, *part.shape[1:]) for part in parts]
        return torch.stack(heads, dim=1).reshape(self.shape)


@dataclass(frozen=True)
class Filled:
    """A tensor of one value, stored nowhere."""

    dtype: str
    shape: tuple[int, ...]
    fill: float = 0.0

    def read(self, box: Box | None = None) -> torch.Tensor:
        import torch

        return torch.full(self.shape if box is None else box.shape, self.fill, dtype=torch_dtype(self.dtype))
