"""Attention heads that lie on two ranks, because the degree does not divide their number; see ``partition.heads``.

Both ranks compute such a head, after an exchange of the columns that each lacks, and each uses its own columns of the
head's context. The products before and after stay perfectly balanced.

    function         forward                                backward
    complete_heads   edge columns to the neighbours         their gradients back, and added there
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_megatron.partition import HeadCut
from hf_megatron.tensor_parallel.collectives import exchange_with_neighbours
from hf_megatron.tensor_parallel.group import TensorParallelGroup


def complete_heads(group: TensorParallelGroup, cut: HeadCut, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Give each rank the columns that it lacks of the heads it computes: a halo exchange.

    Args:
        group: The tensor-parallel group.
        cut: How the heads are cut, N_p of D columns for this rank.
        tensors: Each [..., H_p], split on the last dim; all of one shape and dtype.

    Returns:
        Each [..., N_p x D]: this rank's heads, whole. Neighbours share some. The gradient of a shared head is a partial
        sum on either, of which the backward pass makes the sum.

    Collective: one exchange with the neighbours over tp for all tensors, forward, of fewer than 2 D columns of each;
    one, backward, of as many.
    """
    completed: tuple[torch.Tensor, ...] = _CompleteHeads.apply(group, cut, *tensors)
    return completed


class _CompleteHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: TensorParallelGroup, cut: HeadCut, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.cut = group, cut
        left, right = _exchange_edges(group, tensors, cut.lent, cut.lacking)
        return tuple(torch.cat(parts, -1) for parts in zip(left, tensors, right, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        left, right = _exchange_edges(ctx.group, gradients, ctx.cut.lacking, ctx.cut.lent)
        own = [gradient[..., ctx.cut.columns].clone() for gradient in gradients]
        for gradient, from_left, from_right in zip(own, left, right, strict=True):
            gradient[..., : from_left.shape[-1]] += from_left
            gradient[..., gradient.shape[-1] - from_right.shape[-1] :] += from_right
        return None, None, *own


def _exchange_edges(
    group: TensorParallelGroup, tensors: Sequence[torch.Tensor], sent: tuple[int, int], received: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send the first and last columns to the left and right neighbour; what came from each, [tensors, ..., columns]."""
    stacked = [
        torch.stack([tensor.narrow(-1, start, number) for tensor in tensors])
        for start, number in ((0, sent[0]), (tensors[0].shape[-1] - sent[1], sent[1]))
    ]
    shapes = [(len(tensors), *tensors[0].shape[:-1], number) for number in received]
    return exchange_with_neighbours(group, stacked, shapes)
