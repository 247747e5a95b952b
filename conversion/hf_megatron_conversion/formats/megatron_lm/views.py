"""Tensors in another layout than they are stored in, read by slices."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_megatron.checkpoint import torch_dtype
from hf_megatron.partition import Box
from hf_megatron_conversion.tensors import Readable

if TYPE_CHECKING:
    import torch

__all__ = ["Boxed", "Filled", "Memo", "Padded", "Stacked", "Transposed"]


class Memo:
    """The last tensor that had to be made as a whole, so that its slices are not each made from the whole again.

    One is shared by all views of a model, so that at most one such tensor is in memory.
    """

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
class Transposed:
    """A matrix with rows and columns exchanged: [m, n] as stored becomes [n, m].

    Attributes:
        tensor: As stored.
        memo: Keeps the columns that were read last; whoever writes the matrix reads the same ones for each slice.
    """

    tensor: Readable
    memo: Memo = field(compare=False, repr=False)

    @property
    def dtype(self) -> str:
        """In safetensors' spelling."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """With rows and columns exchanged."""
        rows, columns = self.tensor.shape
        return columns, rows

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The part inside ``box``."""
        box = Box.whole(self.shape) if box is None else box
        (start, first), (size, width) = box.offset, box.shape
        stored = Box((first, 0), (width, self.shape[0]))
        key = (id(self.tensor), first, width)
        whole = self.memo.get(key, lambda: self.tensor.read(stored).t().contiguous())
        return whole[start : start + size]


@dataclass(frozen=True)
class Boxed:
    """A box of a tensor."""

    tensor: Readable
    box: Box

    @property
    def dtype(self) -> str:
        """In safetensors' spelling."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The box's."""
        return self.box.shape

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The part inside ``box``."""
        box = Box.whole(self.shape) if box is None else box
        offset = tuple(a + b for a, b in zip(self.box.offset, box.offset, strict=True))
        return self.tensor.read(Box(offset, box.shape))


@dataclass(frozen=True)
class Padded:
    """Rows of a tensor, followed by as many rows of one value as are missing.

    Attributes:
        tensor: [n, ...].
        start: The first row wanted.
        rows: How many are wanted; those from n on are ``fill``.
        fill: The value.
    """

    tensor: Readable
    start: int
    rows: int
    fill: float = 0.0

    @property
    def dtype(self) -> str:
        """In safetensors' spelling."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, ...]."""
        return self.rows, *self.tensor.shape[1:]

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The part inside ``box``."""
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
    """Queries, keys and values of some heads, one head's after the other: 3 x [heads * d, ...] to [heads * 3 * d, ...].

    Attributes:
        tensors: Where the queries, the keys and the values lie, each [..., h] or [...].
        starts: The first row of each.
        rows: How many of each.
        head_dim: d.
        memo: Keeps the result.
    """

    tensors: Sequence[Readable]
    starts: Sequence[int]
    rows: int
    head_dim: int
    memo: Memo = field(compare=False, repr=False)

    @property
    def dtype(self) -> str:
        """In safetensors' spelling."""
        return self.tensors[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """[3 * rows, ...]."""
        return 3 * self.rows, *self.tensors[0].shape[1:]

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The part inside ``box``."""
        box = Box.whole(self.shape) if box is None else box
        return self.memo.get((id(self.tensors[0]), *self.starts, self.rows), self._make)[box.slices].contiguous()

    def _make(self) -> torch.Tensor:
        import torch

        parts = []
        for tensor, start in zip(self.tensors, self.starts, strict=True):
            part = tensor.read(Box.whole(tensor.shape).narrowed(0, start, start + self.rows))
            parts.append(part.reshape(-1, self.head_dim, *part.shape[1:]))
        return torch.stack(parts, dim=1).reshape(self.shape)


@dataclass(frozen=True)
class Filled:
    """A tensor of one value, stored nowhere."""

    dtype: str
    shape: tuple[int, ...]
    fill: float = 0.0

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The part inside ``box``."""
        import torch

        return torch.full(self.shape if box is None else box.shape, self.fill, dtype=torch_dtype(self.dtype))
