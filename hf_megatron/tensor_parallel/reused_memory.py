"""Memory that is used again in the next step, for the one tensor of a step that is larger than all others."""

from __future__ import annotations

import torch


class ReusedMemory:
    """Where to put a large tensor that is computed anew in every step, such as the gradient of a head's weight.

    On a CPU memory of this size goes back to the operating system when a gradient is dropped, and comes from it again
    page by page: for the head of GPT-2 that takes a third as long as the product that fills it. So the memory of the
    last one is kept, and given out again once nobody holds it. That costs nothing where a step needs most, which is
    when the gradient is there.
    """

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU with any content, whose memory nobody else holds."""
        last = self._last
        if last is None or last.shape != shape or last.dtype != dtype or _is_held(last):
            last = self._last = torch.empty(shape, dtype=dtype)
        return last.detach()  # a tensor of its own, that can become a parameter's gradient as it is

    def release(self) -> None:
        """Give the memory back."""
        self._last = None

    def __reduce__(self) -> tuple[type[ReusedMemory], tuple[()]]:
        return ReusedMemory, ()  # a model is copied and saved without it


def _is_held(tensor: torch.Tensor) -> bool:
    """Whether another tensor has the same memory."""
    storage = tensor.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count > 2  # the tensor, and the variable above
