"""Activation functions by the names that configurations give them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.activations import ACT2FN

# transformers writes this one out, in eight operations that each read and write all activations. The other name is
# torch's fused form of the same formula.
_FUSED = {"gelu_new": "gelu_pytorch_tanh"}


def activation(name: str | Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation of this name, or the function itself; elementwise, for tensors split on any dim."""
    function: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[_FUSED.get(name, name)] if isinstance(name, str) else name
    return function
