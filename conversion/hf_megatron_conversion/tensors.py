"""What conversion needs of a tensor: to read a part of it, in pieces of bounded size, perhaps in another dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

from hf_megatron.checkpoint import DTYPES, LazyTensor, itemsize, torch_dtype
from hf_megatron.errors import UnsupportedError
from hf_megatron.partition import Box

if TYPE_CHECKING:
    import torch


# A tensor is read and written this many bytes at a time, so that the size of the model does not matter.
_SLICE_BYTES = 16 * 2**20
_FLOATS = ("F64", "F32", "F16", "BF16")


class Readable(Protocol):
    """A full tensor of which any box can be read. ``LazyTensor`` is one; a format may wrap it to change its layout."""

    @property
    def dtype(self) -> str:
        """In safetensors' spelling (``"BF16"``)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The full tensor's shape."""

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The part inside ``box`` (default: all of it), as a contiguous CPU tensor."""


def num_bytes(tensor: Readable) -> int:
    """Bytes of a full tensor."""
    return prod(tensor.shape) * itemsize(tensor.dtype)


@dataclass(frozen=True, slots=True)
class Cast:
    """A tensor in another floating-point dtype, cast as it is read."""

    name: str
    tensor: Readable
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read(self, box: Box | None = None) -> torch.Tensor:
        """As of any tensor; UnsupportedError if a finite value becomes infinite."""
        import torch

        original = self.tensor.read(box)
        result = original.to(torch_dtype(self.dtype))
        overflown = torch.isinf(result) & torch.isfinite(original)
        if overflown.any():
            largest = original[overflown].abs().max().item()
            raise UnsupportedError(
                f"{self.name} holds {largest:g}, more than {DTYPES[self.dtype][1]} can; choose bfloat16 or float32."
            )
        return result


def cast(name: str, tensor: Readable, dtype: str | None) -> Readable:
    """``tensor`` in ``dtype`` (safetensors' spelling); itself if that is None, already so, or not for floats."""
    is_cast = dtype is not None and dtype != tensor.dtype and tensor.dtype in _FLOATS
    return Cast(name, tensor, dtype) if dtype is not None and is_cast else tensor


def dtype_code(name: str) -> str:
    """Safetensors' spelling of a floating-point dtype that the user named (``"BF16"``), else UnsupportedError."""
    for code in _FLOATS:
        if name in (code, DTYPES[code][1]):
            return code
    known = ", ".join(DTYPES[code][1] for code in _FLOATS)
    raise UnsupportedError(f"dtype {name!r} is not one of {known}.")


def bounded(box: Box, dtype: str) -> Iterator[Box]:
    """Parts of ``box``, each of bounded bytes, whose row-major bytes one after the other are those of ``box``."""
    if not box.shape:
        yield box
        return
    row_bytes = prod(box.shape[1:]) * itemsize(dtype)
    rows = max(_SLICE_BYTES // max(row_bytes, 1), 1)
    first, last = box.offset[0], box.offset[0] + box.shape[0]
    for start in range(first, last, rows):
        yield box.narrowed(0, start, min(start + rows, last))


class Buffer:
    """Memory for one slice after the other: to get new memory from the system for each takes longer than to read it."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def view(self, num_bytes: int) -> memoryview:
        """So many bytes, which the next call may give away again."""
        if num_bytes > len(self._memory):
            self._memory = bytearray(num_bytes)
        return memoryview(self._memory)[:num_bytes]


def slices_of_bytes(tensor: Readable, box: Box, buffer: Buffer) -> Iterator[memoryview]:
    """The bytes of the part inside ``box``, row-major, in bounded slices, each valid until the next is asked for."""
    for part in bounded(box, tensor.dtype):
        if isinstance(tensor, LazyTensor):
            memory = buffer.view(part.numel * itemsize(tensor.dtype))
            tensor.read_into(memory, part)
            yield memory
        else:
            yield raw_bytes(tensor.read(part)).numpy().data


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous CPU tensor, row-major, as a [nbytes] view of type uint8."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)
