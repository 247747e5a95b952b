"""Activation checkpointing: full and selective recomputation in the backward pass.

Source: Korthikanti et al. 2022, arXiv:2205.05198, section 5, has selective recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_megatron.errors import UnsupportedError


class RecomputationMixin:
    """Adds selective recomputation to the activation checkpointing of ``PreTrainedModel``."""

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Same as the stock method, with one more option in ``activation_checkpointing_kwargs``.

        ``recompute`` may be ``"full"``, whole layers, which is the default, or ``"selective"``: only the attention
        between the projections, which accounts for most of the memory and little of the time. It has no effect with
        fused attention kernels, which store none of it, or in compiled models, where the compiler decides.
        UnsupportedError if it is anything else.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        recompute = options.pop("recompute", "full")
        if recompute not in ("full", "selective"):
            raise UnsupportedError(
                f"recompute={recompute!r} in activation_checkpointing_kwargs: choose 'full' for whole layers, or "
                "'selective' for attention only. To recompute nothing, leave activation checkpointing off."
            )
        super().activation_checkpointing_enable(options, *args, **kwargs)  # type: ignore[misc]
        for layer in self.modules() if recompute == "selective" else ():  # type: ignore[attr-defined]
            if isinstance(layer, GradientCheckpointingLayer):
                layer._gradient_checkpointing_func = partial(_run_layer, layer._gradient_checkpointing_func)


def _run_layer(checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint only the attention of a layer, instead of the whole layer."""
    if torch.compiler.is_compiling():
        # In a checkpoint, torch 2.13's compiler draws other dropout masks and mistakes a DTensor's mesh for a tensor.
        return forward(*args)
    return forward(*args, recompute=checkpoint)
