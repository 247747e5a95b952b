"""Matrix products at the entry of a parallel region, whose communication travels while other products are computed.

Shapes: ``in`` and ``out`` are full sizes, ``out_p`` is this rank's part of ``out``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from hf_megatron.tensor_parallel.group import TensorParallelGroup
from hf_megatron.tensor_parallel.mappings import (
    copy_to_tensor_parallel_region,
    start_all_gather,
    start_reduce_scatter,
)

__all__ = ["copied_product", "gathered_products"]


def copied_product(
    group: TensorParallelGroup,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    is_transposed: bool,
    bias_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """``copy_to_tensor_parallel_region`` and the product behind it.

    The gradient of x is summed over the ranks while that of the weight is computed.

    Args:
        group: The tensor-parallel group.
        x: [..., in], replicated.
        weight: [in, out_p], split on dim 1; stored as [out_p, in] if ``is_transposed``.
        bias: [out_p], split; or [out], replicated, with a ``bias_index``; or None.
        is_transposed: How the weight is stored.
        bias_index: [out_p], which elements of a bias that is held whole are this rank's. Its gradient shares the
            collective of x's.

    Returns:
        [..., out_p], split on the last dim.

    Collective: all-reduce over tp, backward, of the gradients of x and of a bias that is held whole.
    """
    if group.size > 1 and torch.is_grad_enabled():
        device = x.device.type
        if torch.is_autocast_enabled(device):  # which casts the arguments of torch's functions, not of ours
            dtype = torch.get_autocast_dtype(device)
            x, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight))
        product: torch.Tensor = _CopiedProduct.apply(group, is_transposed, x, weight, bias, bias_index)
        return product
    (x,) = copy_to_tensor_parallel_region(group, x)
    return _product(x, weight, bias if bias is None or bias_index is None else bias[bias_index], is_transposed)


def gathered_products(
    group: TensorParallelGroup,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *,
    length: int,
    is_transposed: bool,
) -> tuple[torch.Tensor, ...]:
    """``gather_from_sequence_parallel_region`` and the products behind it, which keep no full tensor until backward.

    A product needs its input again for the gradient of its weight. Of that input only this rank's positions are kept,
    and the backward pass gathers them once more, while it computes the gradient of x.

    Args:
        group: The tensor-parallel group, of more than one rank.
        x: [..., S_p, in], split on the sequence as ``torch.chunk`` cuts ``length``.
        weights: Each [in, out_p], split on dim 1; stored as [out_p, in] if ``is_transposed``.
        length: S, the length of the sequence.
        is_transposed: How the weights are stored.

    Returns:
        For each weight [..., S, out_p], split on the last dim.

    Collective: all-gather over tp, forward; all-gather over tp, backward, if a weight needs a gradient; reduce-scatter
    over tp, backward, of the sum of the products' gradients of x.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):  # which casts the arguments of torch's functions, not of ours
        dtype = torch.get_autocast_dtype(device)
        x, *weights = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, *weights))
    products: tuple[torch.Tensor, ...] = _GatheredProducts.apply(group, length, is_transposed, x, *weights)
    return products


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool) -> torch.Tensor:
    matrix = weight.t() if is_transposed else weight
    flat = x.reshape(-1, x.shape[-1])
    product = flat @ matrix if bias is None else torch.addmm(bias.to(flat.dtype), flat, matrix)
    return product.view(*x.shape[:-1], matrix.shape[1])


class _CopiedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        group: TensorParallelGroup,
        is_transposed: bool,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        bias_index: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.group, ctx.is_transposed = group, is_transposed
        ctx.bias = None if bias is None else (bias.numel(), bias.dtype)
        ctx.save_for_backward(x, weight, bias_index)
        return _product(x, weight, bias if bias is None or bias_index is None else bias[bias_index], is_transposed)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias_index = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[2:5]
        flat = gradient.reshape(-1, gradient.shape[-1])
        sent = [flat @ (weight if ctx.is_transposed else weight.t())] if needs_x else []
        bias_gradient = flat.sum(0) if needs_bias else None
        if bias_gradient is not None and bias_index is not None:
            whole = bias_gradient.new_zeros(ctx.bias[0])
            whole[bias_index] = bias_gradient
            sent.append(whole)
        # Not in place on what autograd handed in: these tensors were made here.
        buffer = torch.cat([part.reshape(-1) for part in sent]) if len(sent) > 1 else sent[0] if sent else None
        work = None
        if buffer is not None:
            is_async = not torch.compiler.is_compiling()  # a compiler knows no work handles, and orders things itself
            work = dist.all_reduce(buffer, group=ctx.group.process_group, async_op=is_async)
        weight_gradient = None
        if needs_weight:
            rows = x.reshape(-1, x.shape[-1])
            weight_gradient = flat.t() @ rows if ctx.is_transposed else rows.t() @ flat
        if work is not None:
            work.wait()
        x_gradient = None
        if needs_x and buffer is not None:
            x_gradient = buffer.view(-1)[: x.numel()].view(x.shape)
        if bias_gradient is not None and bias_index is not None and buffer is not None:
            # A copy: as a view it would hold on to the buffer as long as the parameter has a gradient.
            bias_gradient = buffer[-ctx.bias[0] :].clone()
        if bias_gradient is not None:
            bias_gradient = bias_gradient.to(ctx.bias[1])
        return None, None, x_gradient, weight_gradient, bias_gradient, None


class _GatheredProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: TensorParallelGroup, length: int, is_transposed: bool, x: torch.Tensor, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.length, ctx.is_transposed = group, length, is_transposed
        ctx.save_for_backward(x, *weights)
        full = start_all_gather(group, x, x.dim() - 2, length, is_async=False)()
        return tuple(_product(full, weight, None, is_transposed) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, *needs_weights = ctx.needs_input_grad[3:]
        sequence = x.dim() - 2
        gather = start_all_gather(ctx.group, x, sequence, ctx.length) if any(needs_weights) else None
        reduce_scatter = None
        if needs_x:
            full_gradient = gradients[0] @ (weights[0] if ctx.is_transposed else weights[0].t())
            for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
                full_gradient += gradient @ (weight if ctx.is_transposed else weight.t())
            reduce_scatter = start_reduce_scatter(ctx.group, full_gradient, sequence)
        weight_gradients: list[torch.Tensor | None] = [None] * len(weights)
        if gather is not None:
            rows = gather().reshape(-1, x.shape[-1])
            for i, gradient in enumerate(gradients):
                if needs_weights[i]:
                    flat = gradient.reshape(-1, gradient.shape[-1])
                    weight_gradients[i] = flat.t() @ rows if ctx.is_transposed else rows.t() @ flat
        return None, None, None, None if reduce_scatter is None else reduce_scatter(), *weight_gradients
