"""The communication of tensor parallelism: where a tensor enters, leaves or changes its layout.

Each function is the identity on one rank. On several it is one collective, in the forward or in the backward pass:

    function                                    forward                  backward               paper
    copy_to_tensor_parallel_region              identity                 all-reduce             f
    reduce_from_tensor_parallel_region          all-reduce               identity               g
    gather_from_tensor_parallel_region          all-gather along a dim   this rank's slice      -
    scatter_to_tensor_parallel_region           this rank's slice        all-gather             -

None of them changes a tensor it was given. An all-reduce in place on an incoming gradient would also change the
gradient of whatever else received it: in ``y = copy_to(x) + z`` autograd hands one tensor to both branches.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3, operators f and g of figure 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hf_megatron.partition import chunk_range
from hf_megatron.tensor_parallel.group import TensorParallelGroup

__all__ = [
    "copy_to_tensor_parallel_region",
    "gather_from_tensor_parallel_region",
    "reduce_from_tensor_parallel_region",
    "scatter_to_tensor_parallel_region",
]


# torch 2.13 renamed it and warns about the old name.
all_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def copy_to_tensor_parallel_region(group: TensorParallelGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Enter the parallel region: the paper's ``f``.

    Args:
        group: The tensor-parallel group.
        tensors: Replicated on all ranks, any shapes. Those given together share one collective per dtype.

    Returns:
        The same values, still replicated. What is computed from them differs per rank, so their gradients are partial
        sums, which the backward pass makes whole.

    Collective: all-reduce over tp, backward, of all the gradients' elements.
    """
    if group.size == 1 or not torch.is_grad_enabled():
        return tensors
    outputs: tuple[torch.Tensor, ...] = _Copy.apply(group, *tensors)
    return outputs


def reduce_from_tensor_parallel_region(group: TensorParallelGroup, tensor: torch.Tensor) -> torch.Tensor:
    """Leave the parallel region: the paper's ``g``.

    Args:
        group: The tensor-parallel group.
        tensor: A partial sum on each rank, any shape; left as it is.

    Returns:
        The sum over ranks, replicated.

    Collective: all-reduce over tp, forward, of the tensor.
    """
    if group.size == 1:
        return tensor
    output: torch.Tensor = _Reduce.apply(group, tensor)
    return output


def gather_from_tensor_parallel_region(
    group: TensorParallelGroup, tensor: torch.Tensor, *, dim: int, size: int
) -> torch.Tensor:
    """Make a tensor that is split along ``dim`` whole on every rank.

    Args:
        group: The tensor-parallel group.
        tensor: Split on ``dim`` as ``torch.chunk`` cuts ``size``, sizes may be uneven.
        dim: The dimension it is split on.
        size: Size of that dimension when whole.

    Returns:
        The full tensor, replicated. Its gradient must be the same on all ranks, as that of any replicated tensor is.

    Collective: all-gather over tp, forward, of the largest shard's size.
    """
    if group.size == 1:
        return tensor
    output: torch.Tensor = _Gather.apply(group, tensor, dim % tensor.dim(), size)
    return output


def scatter_to_tensor_parallel_region(group: TensorParallelGroup, tensor: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Keep this rank's slice of a replicated tensor.

    Args:
        group: The tensor-parallel group.
        tensor: Replicated, any shape.
        dim: The dimension to split, cut as ``torch.chunk`` cuts it.

    Returns:
        This rank's slice, split on ``dim``.

    Collective: all-gather over tp, backward.
    """
    if group.size == 1:
        return tensor
    output: torch.Tensor = _Scatter.apply(group, tensor, dim % tensor.dim())
    return output


def _all_reduced(group: TensorParallelGroup, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sums over ranks of several tensors of one dtype, with one collective; the arguments stay as they are."""
    if len(tensors) == 1:
        total = tensors[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group.process_group)
        return [total]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group.process_group)
    totals = [
        part.view(tensor.shape)
        for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True)
    ]
    # Views keep the whole buffer alive, and a parameter keeps its gradient: a bias would hold on to activations.
    largest = max(total.numel() for total in totals)
    return [total if total.numel() == largest else total.clone() for total in totals]


def _gathered(group: TensorParallelGroup, shard: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The full tensor from shards that may differ in size: padded to the largest, gathered, trimmed."""
    largest = chunk_range(size, group.size, 0)[1]
    rows = shard.movedim(dim, 0)
    padded = rows.new_zeros((largest, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    gathered = padded.new_empty((group.size * largest, *rows.shape[1:]))
    all_gather_single(gathered, padded, group=group.process_group)
    # torch.chunk fills every rank but the last ones, so the padding is at the end of all.
    return gathered[:size].movedim(0, dim)


def _sliced(group: TensorParallelGroup, tensor: torch.Tensor, dim: int) -> torch.Tensor:
    start, stop = chunk_range(tensor.shape[dim], group.size, group.rank)
    return tensor.narrow(dim, start, stop - start)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: TensorParallelGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = [i for i in range(len(gradients)) if ctx.needs_input_grad[i + 1]]
        results: list[torch.Tensor | None] = [None] * len(gradients)
        for dtype in dict.fromkeys(gradients[i].dtype for i in needed):
            chosen = [i for i in needed if gradients[i].dtype == dtype]
            for i, total in zip(chosen, _all_reduced(ctx.group, [gradients[i] for i in chosen]), strict=True):
                results[i] = total
        return None, *results


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: TensorParallelGroup, tensor: torch.Tensor) -> torch.Tensor:
        return _all_reduced(group, [tensor])[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradient


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: TensorParallelGroup, tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(group, tensor, dim, size)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        return None, _sliced(ctx.group, gradient, ctx.dim).contiguous(), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: TensorParallelGroup, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.size = group, dim, tensor.shape[dim]
        # A copy, as a view would keep the whole tensor alive.
        return _sliced(group, tensor, dim).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        return None, _gathered(ctx.group, gradient, ctx.dim, ctx.size), None
