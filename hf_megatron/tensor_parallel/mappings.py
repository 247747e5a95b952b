"""Communication of tensor parallelism: functions that enter and leave parallel regions or change a layout.

Each function is the identity on one rank. On several it is one collective, in the forward or in the backward pass:

    function                                    forward                  backward               paper
    copy_to_tensor_parallel_region              identity                 all-reduce             f
    reduce_from_tensor_parallel_region          all-reduce               identity               g
    gather_from_tensor_parallel_region          all-gather along a dim   this rank's slice      -
    scatter_to_tensor_parallel_region           this rank's slice        all-gather             -

    With sequence parallelism the second paper's g and g-bar take the places of f and g:

    gather_from_sequence_parallel_region        all-gather               reduce-scatter         g
    reduce_scatter_to_sequence_parallel_region  reduce-scatter           all-gather             g-bar

None of them modifies its input, unless it is told to. An in-place all-reduce of an incoming gradient would also change
it for other branches: in ``y = copy_to(x) + z``, autograd passes the same tensor to both.

Sources: Shoeybi et al. 2019, arXiv:1909.08053, section 3, operators f and g of figure 3; Korthikanti et al. 2022,
arXiv:2205.05198, section 4.2, operators g and g-bar of figures 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_megatron.partition import chunk_range
from hf_megatron.tensor_parallel.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from hf_megatron.tensor_parallel.group import TensorParallelGroup


def copy_to_tensor_parallel_region(group: TensorParallelGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Enter the parallel region (``f`` in the Megatron-LM paper) with replicated tensors of any shapes, as they are.

    What is computed from them differs per rank, so their gradients are partial sums, which the backward pass makes
    whole. Tensors given together share one collective per dtype.

    Collective: all-reduce over tp, backward, of all the gradients' elements.
    """
    if group.size == 1 or not torch.is_grad_enabled():
        return tensors
    outputs: tuple[torch.Tensor, ...] = _Copy.apply(group, *tensors)
    return outputs


def reduce_from_tensor_parallel_region(
    group: TensorParallelGroup, tensor: torch.Tensor, *, in_place: bool = False
) -> torch.Tensor:
    """Leave the parallel region (``g`` in the Megatron-LM paper): partial sums of any shape to their sum, replicated.

    ``in_place`` leaves the sum in the tensor's memory, for one that is contiguous, has just been computed, and is held
    by nobody else, nor saved for the backward pass.

    Collective: all-reduce over tp, forward, of the tensor.
    """
    is_reused = in_place and not torch.compiler.is_compiling()  # which plans memory itself
    return _mapped(group, tensor, partial(_all_reduced, group, in_place=is_reused), _same)


def gather_from_tensor_parallel_region(
    group: TensorParallelGroup, tensor: torch.Tensor, *, dim: int, size: int
) -> torch.Tensor:
    """All-gather a tensor that is split on ``dim`` as ``torch.chunk`` cuts ``size``: the full tensor, replicated.

    Its gradient must be the same on all ranks, as that of any replicated tensor is.

    Collective: all-gather over tp, forward, of the largest shard's size.
    """
    dim %= tensor.dim()
    return _mapped(group, tensor, partial(_gathered, group, dim, size), partial(_sliced, group, dim))


def scatter_to_tensor_parallel_region(group: TensorParallelGroup, tensor: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Keep this rank's slice of a replicated tensor, split on ``dim`` as ``torch.chunk`` cuts it.

    Collective: all-gather over tp, backward.
    """
    dim %= tensor.dim()
    return _mapped(group, tensor, partial(_sliced, group, dim), partial(_gathered, group, dim, tensor.shape[dim]))


def gather_from_sequence_parallel_region(
    group: TensorParallelGroup, tensor: torch.Tensor, *, dim: int, size: int
) -> torch.Tensor:
    """Enter the parallel region with all positions: the second paper's ``g``.

    The tensor is split on ``dim``, the sequence, as ``torch.chunk`` cuts ``size``; the result is full and replicated.
    What is computed from it differs per rank, so its gradient is a partial sum, of which the backward pass makes this
    rank's slice whole.

    Collective: all-gather over tp, forward; reduce-scatter over tp, backward. Both of ``size`` rounded up to a multiple
    of the degree.
    """
    dim %= tensor.dim()
    return _mapped(group, tensor, partial(_gathered, group, dim, size), partial(_reduce_scattered, group, dim))


def reduce_scatter_to_sequence_parallel_region(
    group: TensorParallelGroup, tensor: torch.Tensor, *, dim: int
) -> torch.Tensor:
    """Leave the parallel region, each rank with its part of the positions: the second paper's ``g-bar``.

    Partial sums to this rank's slice of their sum, split on ``dim``, the sequence, as ``torch.chunk`` cuts it.

    Collective: reduce-scatter over tp, forward; all-gather over tp, backward.
    """
    dim %= tensor.dim()
    gather = partial(_gathered, group, dim, tensor.shape[dim])
    return _mapped(group, tensor, partial(_reduce_scattered, group, dim), gather)


Map = Callable[[torch.Tensor], torch.Tensor]


def _mapped(group: TensorParallelGroup, tensor: torch.Tensor, forward: Map, backward: Map) -> torch.Tensor:
    """``forward(tensor)``, whose gradient is ``backward(gradient)``; on one rank the tensor itself."""
    if group.size == 1:
        return tensor
    output: torch.Tensor = _Mapping.apply(forward, backward, tensor)
    return output


class _Mapping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Map, backward: Map, tensor: torch.Tensor) -> torch.Tensor:
        ctx.map = backward
        return forward(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        return None, None, ctx.map(gradient)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: TensorParallelGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = [i for i in range(len(gradients)) if ctx.needs_input_grad[i + 1]]
        results: list[torch.Tensor | None] = [None] * len(gradients)
        for dtype in dict.fromkeys(gradients[i].dtype for i in needed):
            chosen = [i for i in needed if gradients[i].dtype == dtype]
            for i, total in zip(chosen, _all_reduced_together(ctx.group, [gradients[i] for i in chosen]), strict=True):
                results[i] = total
        return None, *results


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _all_reduced(group: TensorParallelGroup, tensor: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
    total = tensor.detach() if in_place else tensor.clone(memory_format=torch.contiguous_format)
    start_all_reduce(group, total, is_async=False)()
    return total


def _all_reduced_together(group: TensorParallelGroup, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """All-reduce several tensors of one dtype with a single collective."""
    if len(tensors) == 1:
        return [_all_reduced(group, tensors[0])]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    start_all_reduce(group, flat, is_async=False)()
    parts = flat.split([tensor.numel() for tensor in tensors])
    totals = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    # Copy: as views, gradients of biases would keep the whole buffer, of the size of activations, alive.
    largest = max(total.numel() for total in totals)
    return [total if total.numel() == largest else total.clone() for total in totals]


def _gathered(group: TensorParallelGroup, dim: int, size: int, shard: torch.Tensor) -> torch.Tensor:
    return start_all_gather(group, shard, dim, size, is_async=False)()


def _reduce_scattered(group: TensorParallelGroup, dim: int, tensor: torch.Tensor) -> torch.Tensor:
    return start_reduce_scatter(group, tensor, dim, is_async=False)()


def _sliced(group: TensorParallelGroup, dim: int, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of this rank's slice; a view would keep the whole tensor alive."""
    start, stop = chunk_range(tensor.shape[dim], group.size, group.rank)
    return tensor.narrow(dim, start, stop - start).clone(memory_format=torch.contiguous_format)
