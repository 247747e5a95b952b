"""What conversion needs of a tensor: to read a part of it, in pieces of bounded size, perhaps in another dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Protocol

from hf_megatron.checkpoint import DTYPES, itemsize, torch_dtype
from hf_megatron.errors import UnsupportedError
from hf_megatron.partition import Box

if TYPE_CHECKING:
    import torch


SLICE_BYTES = 16 * 2**20
"""A tensor is read and written this many bytes at a time, so that the size of the model does not matter."""
CAST_BYTES = 4 * 2**20
"""What is cast is read this many bytes at a time, beside the slice that it is cast into."""
_CAST_CHUNK = 2**15  # elements, which torch casts in this thread alone; others have files of their own to write
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

    def read_into(self, memory: memoryview, box: Box) -> None:
        """The same into memory of exactly its bytes, row-major. Where this is enough, torch need not be imported."""


def num_bytes(tensor: Readable | Reshaped) -> int:
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

        box = Box.whole(self.shape) if box is None else box
        result = torch.empty(box.shape, dtype=torch_dtype(self.dtype))
        self.read_into(raw_bytes(result).numpy().data, box)
        return result

    def read_into(self, memory: memoryview, box: Box) -> None:
        import torch

        if not box.numel:
            return
        stored, item = torch_dtype(self.tensor.dtype), itemsize(self.tensor.dtype)
        result = torch.frombuffer(memory, dtype=torch_dtype(self.dtype))
        # Memory of its own for each part would leave the allocator with several times as much.
        scratch = memoryview(bytearray(min(box.numel * item, CAST_BYTES)))
        for part in bounded(box, self.tensor.dtype, CAST_BYTES):
            original = scratch[: part.numel * item]
            self.tensor.read_into(original, part)
            for chunk in torch.frombuffer(original, dtype=stored).split(_CAST_CHUNK):
                self._cast_chunk(chunk, result[: chunk.numel()])
                result = result[chunk.numel() :]

    def _cast_chunk(self, original: torch.Tensor, result: torch.Tensor) -> None:
        import torch

        result.copy_(original)
        overflown = torch.isinf(result) & torch.isfinite(original)
        if overflown.any():
            largest = original[overflown].abs().max().item()
            raise UnsupportedError(
                f"{self.name} holds {largest:g}, more than {DTYPES[self.dtype][1]} can; choose bfloat16 or float32."
            )


@dataclass(frozen=True)
class Reshaped:
    """A tensor that is stored with more dimensions, and written as one of this shape with the same bytes."""

    tensor: Readable
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.tensor.dtype


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


def bounded(box: Box, dtype: str, num_bytes: int | None = None) -> Iterator[Box]:
    """Parts of ``box``, each of bounded bytes, whose row-major bytes one after the other are those of ``box``.

    They are as many rows as are within ``num_bytes`` (default: SLICE_BYTES), or parts of one row where even that is
    more.
    """
    if not box.shape or not box.numel:
        yield box
        return
    num_bytes = SLICE_BYTES if num_bytes is None else num_bytes
    sizes = [prod(box.shape[dim + 1 :]) * itemsize(dtype) for dim in range(len(box.shape))]  # bytes of one entry
    cut = next((dim for dim, size in enumerate(sizes) if size <= num_bytes), len(sizes) - 1)
    step = max(num_bytes // sizes[cut], 1)
    stop = box.offset[cut] + box.shape[cut]
    starts = (range(start, start + size) for start, size in zip(box.offset[:cut], box.shape[:cut], strict=True))
    for index in product(*starts):
        for start in range(box.offset[cut], stop, step):
            shape = (*[1] * cut, min(step, stop - start), *box.shape[cut + 1 :])
            yield Box((*index, start, *box.offset[cut + 1 :]), shape)


class Buffer:
    """Memory for one slice after the other: to get new memory from the system for each takes longer than to read it.

    ``num_bytes`` is what a slice may have.
    """

    def __init__(self, num_bytes: int | None = None) -> None:
        self.num_bytes = num_bytes
        self._memory = bytearray()

    def view(self, num_bytes: int) -> memoryview:
        """So many bytes, which the next call may give away again."""
        if num_bytes > len(self._memory):
            # As much as a slice may have, at once: while it grows, there are two.
            self._memory = bytearray(max(num_bytes, SLICE_BYTES if self.num_bytes is None else self.num_bytes))
        return memoryview(self._memory)[:num_bytes]


def slices_of_bytes(tensor: Readable, box: Box, buffer: Buffer) -> Iterator[memoryview]:
    """The bytes of the part inside ``box``, row-major, in bounded slices, each valid until the next is asked for."""
    for part in bounded(box, tensor.dtype, buffer.num_bytes):
        memory = buffer.view(part.numel * itemsize(tensor.dtype))
        tensor.read_into(memory, part)
        yield memory


def have_same_bytes(a: Readable, b: Readable) -> bool:
    """Whether two tensors are the same bit for bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    box = Box.whole(a.shape)
    slices = zip(slices_of_bytes(a, box, Buffer()), slices_of_bytes(b, box, Buffer()), strict=True)
    return all(bytes(part) == other for part, other in slices)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous CPU tensor, row-major, as a [nbytes] view of type uint8."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)
