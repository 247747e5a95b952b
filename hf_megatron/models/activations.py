"""Activation functions by configuration name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.activations import ACT2FN

# transformers computes gelu_new in eight elementwise operations. The other name is torch's fused kernel for the same
# formula.
_FUSED = {"gelu_new": "gelu_pytorch_tanh"}


def activation(name: str | Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Look up an activation by name; functions are returned as they are. Elementwise, so any split is fine."""
    function: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[_FUSED.get(name, name)] if isinstance(name, str) else name
    return function
