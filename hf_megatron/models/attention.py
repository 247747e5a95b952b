"""Attention split by heads: each rank computes its own heads, without communication where the degree divides them.

Shapes: B batch, S_q queries, S_k keys, N heads, N_p heads that a rank computes, D head dim, H = N x D hidden.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3 and figure 3b.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_megatron.errors import PartitionError
from hf_megatron.partition import HeadCut
from hf_megatron.tensor_parallel import (
    ParallelModule,
    SequenceParallelRegion,
    TensorParallelGroup,
    attention_dropout,
    complete_heads,
)
from hf_megatron.tensor_parallel.random import compiled_attention, private_stream


class ParallelAttention(ParallelModule):
    """Scaled dot-product attention over this rank's heads; subclasses add the projections around it.

    Args:
        config: The model's configuration; ``_attn_implementation`` says which kernel to use.
        num_heads: N, over all ranks.
        head_dim: D.
        dropout: Probability of dropping an attention probability in training.
        scaling: Factor on the scores.
        is_causal: Whether attention is causal if a call has neither a mask nor its own ``is_causal``.
        upcast: Compute the scores and their softmax in float32 (eager attention only).
        layer_idx: Index of this layer in the key-value cache.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        num_heads: int,
        head_dim: int,
        dropout: float,
        scaling: float,
        is_causal: bool,
        upcast: bool = False,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dropout_p = float(dropout)
        self.scaling, self.is_causal, self.upcast, self.layer_idx = scaling, is_causal, upcast, layer_idx
        self.head_cut = HeadCut(num_heads, head_dim, 1, 0)

    @property
    def num_heads_per_partition(self) -> int:
        """N_p, the heads that this rank computes, some of them together with a neighbour."""
        return len(self.head_cut.heads)

    @property
    def first_head(self) -> int:
        """Global index of this rank's first head."""
        return self.head_cut.heads.start

    def set_tensor_parallel(self, group: TensorParallelGroup) -> None:
        if group.size > self.num_heads:
            raise PartitionError(f"{self.num_heads} heads are too few for {group.size} ranks.")
        super().set_tensor_parallel(group)
        self.head_cut = HeadCut(self.num_heads, self.head_dim, group.size, group.rank)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, N_p x D] to [B, N_p, S, D], split by heads before and after."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        *,
        region: SequenceParallelRegion | None = None,
        recompute: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend with this rank's heads: queries [B, S_q, H_p], keys and values [B, S, H_p], split on the last dim.

        With a region all of them, and the context, have the sequence first.

        The mask is broadcastable to [B, N_p, S_q, S_k], boolean (True: attend) or additive, replicated. The cache holds
        and receives this rank's heads of this layer. ``recompute`` is a function like
        ``torch.utils.checkpoint.checkpoint`` with which to recompute the attention in the backward pass; None stores
        its intermediate results. Fused kernels store none anyway. ``kwargs`` are for the kernel.

        Returns the context [B, S_q, H_p], split on the last dim, and where the kernel keeps them the probabilities
        [B, heads, S_q, S_k], split by heads: over all ranks, each head is there once.

        A head that lies on two ranks is computed on both. A fused kernel on a GPU draws its dropout for each rank.

        Collective: those of :func:`complete_heads`, if some head lies on two ranks.
        """
        cut = self.head_cut
        if region is not None:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if cut.is_shared:
            query, key, value = complete_heads(self.tp_group, cut, query, key, value)
        query, key, value = (self.split_heads(x) for x in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)
        dropout = self.dropout_p if self.training else 0.0
        is_causal = self.is_causal if kwargs.get("is_causal") is None else kwargs["is_causal"]
        implementation = self.config._attn_implementation
        is_private = bool(dropout) and self.tp_group.size > 1
        if implementation == "eager" or (dropout and implementation == "sdpa" and not _has_fused_dropout(query)):
            # sdpa draws dropout masks from the default generator, which would give every rank the same masks. CPUs
            # have no fused kernel with dropout, so drawing per head costs nothing there.
            explicit = self._explicit if recompute is None else partial(recompute, self._explicit)
            context, probabilities = explicit(query, key, value, attention_mask, dropout, is_causal)
        elif is_private and implementation == "sdpa" and torch.compiler.is_compiling():
            context = compiled_attention(
                query,
                key,
                value,
                attention_mask,
                p=dropout,
                is_causal=is_causal and attention_mask is None and query.shape[2] > 1,
                scaling=self.scaling,
                first_head=self.first_head,
            ).transpose(1, 2)
            probabilities = None
        else:
            # Within a region directly: transformers' function copies a context that has the sequence first in memory.
            kernel = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, None)
            kernel = _attend_directly if implementation == "sdpa" and region is not None else kernel
            with private_stream(query.device, self.first_head) if is_private else nullcontext():
                context, probabilities = kernel(
                    self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
                )
        context = context.reshape(*context.shape[:-2], -1)
        if cut.is_shared:
            context = context[..., cut.columns]
            if probabilities is not None:
                probabilities = probabilities[:, cut.first_here.start - cut.heads.start :]
        # Not made contiguous with a region: the copy would be kept for the backward pass, beside that of the kernel.
        return context.contiguous() if region is None else context.transpose(0, 1), probabilities

    def _explicit(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        is_causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Eager attention on [B, N_p, S, D]: materializes the probabilities, with one dropout mask per global head."""
        if self.upcast and self.config._attn_implementation == "eager":
            with torch.autocast(query.device.type, enabled=False):
                scores = torch.matmul(query.float() * self.scaling, key.float().transpose(-1, -2))
        else:
            scores = torch.matmul(query, key.transpose(-1, -2)) * self.scaling
        if mask is None and is_causal and query.shape[2] > 1:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            mask = mask.tril(key.shape[2] - query.shape[2])
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        probabilities = torch.softmax(scores, dim=-1).to(value.dtype)
        probabilities = attention_dropout(probabilities, dropout, self.first_head)
        return torch.matmul(probabilities, value).transpose(1, 2), probabilities


def _attend_directly(
    module: ParallelAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    dropout: float,
    scaling: float,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' function for sdpa, but that the context [B, S_q, N_p, D] stays as the kernel has laid it out."""
    is_causal = module.is_causal if is_causal is None else is_causal
    is_causal = is_causal and mask is None and query.shape[2] > 1
    context = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scale=scaling)
    return context.transpose(1, 2), None


def _has_fused_dropout(query: torch.Tensor) -> bool:
    """Whether kernels of the device draw dropout themselves."""
    return not query.is_cpu
