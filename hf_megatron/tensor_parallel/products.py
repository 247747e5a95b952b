"""Matrix products at the entry of a parallel region, whose communication travels while other products are computed.

Shapes: ``in`` and ``out`` are full sizes, ``out_p`` is this rank's part of ``out``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_megatron.tensor_parallel.collectives import start_all_reduce
from hf_megatron.tensor_parallel.group import TensorParallelGroup
from hf_megatron.tensor_parallel.mappings import (
    start_all_gather,
    start_reduce_scatter,
)


def copied_products(
    group: TensorParallelGroup,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    is_transposed: bool,
    bias_index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """``copy_to_tensor_parallel_region`` and the products behind it.

    The gradient of x is summed over the ranks while those of the weights are computed.

    Args:
        group: The tensor-parallel group, of more than one rank.
        x: [..., in], replicated.
        weights: Each [in, out_p], split on dim 1; stored as [out_p, in] if ``is_transposed``.
        biases: For each weight [out_p], split; or [out], replicated, with a ``bias_index``; or None.
        is_transposed: How the weights are stored.
        bias_index: [out_p], which elements of a single bias that is held whole are this rank's. Its gradient shares the
            collective of x's.

    Returns:
        For each weight [..., out_p], split on the last dim.

    Collective: all-reduce over tp, backward, of the gradients of x and of a bias that is held whole.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):  # which casts the arguments of torch's functions, not of ours
        dtype = torch.get_autocast_dtype(device)
        x, *weights = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, *weights))
    products: tuple[torch.Tensor, ...] = _CopiedProducts.apply(group, is_transposed, bias_index, x, *weights, *biases)
    return products


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


def _input_gradient(
    gradients: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], is_transposed: bool
) -> torch.Tensor:
    """The products' gradients [T, out_p] to the gradient of their common input [T, in], a partial sum."""
    matrices = [weight if is_transposed else weight.t() for weight in weights]
    total = gradients[0] @ matrices[0]
    for gradient, matrix in zip(gradients[1:], matrices[1:], strict=True):
        total.addmm_(gradient, matrix)
    return total


def _weight_gradients(
    x: torch.Tensor, gradients: Sequence[torch.Tensor], needed: Sequence[bool], is_transposed: bool
) -> list[torch.Tensor | None]:
    """Of an input [..., in] and the products' gradients [T, out_p], those of the weights, as the weights are stored."""
    rows = x.reshape(-1, x.shape[-1])
    return [
        None if not is_needed else gradient.t() @ rows if is_transposed else rows.t() @ gradient
        for gradient, is_needed in zip(gradients, needed, strict=True)
    ]


class _CopiedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        group: TensorParallelGroup,
        is_transposed: bool,
        bias_index: torch.Tensor | None,
        x: torch.Tensor,
        *weights_and_biases: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.is_transposed, count = group, is_transposed, len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        ctx.biases = [None if bias is None else (bias.numel(), bias.dtype) for bias in biases]
        ctx.save_for_backward(x, bias_index, *weights)
        used = biases if bias_index is None else [None if bias is None else bias[bias_index] for bias in biases]
        return tuple(_product(x, weight, bias, is_transposed) for weight, bias in zip(weights, used, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, bias_index, *weights = ctx.saved_tensors
        _, _, _, needs_x, *needs = ctx.needs_input_grad
        needs_weights, needs_biases = needs[: len(weights)], needs[len(weights) :]
        flats = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        sent = [_input_gradient(flats, weights, ctx.is_transposed)] if needs_x else []
        bias_gradients = [flat.sum(0) if needed else None for flat, needed in zip(flats, needs_biases, strict=True)]
        if bias_index is not None and bias_gradients[0] is not None:
            whole = bias_gradients[0].new_zeros(ctx.biases[0][0])
            whole[bias_index] = bias_gradients[0]
            sent.append(whole)
        # Not in place on what autograd handed in: these tensors were made here.
        buffer = torch.cat([part.reshape(-1) for part in sent]) if len(sent) > 1 else sent[0] if sent else None
        wait = start_all_reduce(ctx.group, buffer) if buffer is not None else None
        weight_gradients = _weight_gradients(x, flats, needs_weights, ctx.is_transposed)
        if wait is not None:
            wait()
        x_gradient = None
        if needs_x and buffer is not None:
            x_gradient = buffer.view(-1)[: x.numel()].view(x.shape)
        if bias_index is not None and bias_gradients[0] is not None and buffer is not None:
            # A copy: as a view it would hold on to the buffer as long as the parameter has a gradient.
            bias_gradients[0] = buffer[-ctx.biases[0][0] :].clone()
        bias_gradients = [
            None if gradient is None else gradient.to(bias[1])
            for gradient, bias in zip(bias_gradients, ctx.biases, strict=True)
        ]
        return None, None, None, x_gradient, *weight_gradients, *bias_gradients


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
        flats = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        sequence = x.dim() - 2
        gather = start_all_gather(ctx.group, x, sequence, ctx.length) if any(needs_weights) else None
        reduce_scatter = None
        if needs_x:
            full_gradient = _input_gradient(flats, weights, ctx.is_transposed)
            full_gradient = full_gradient.view(*gradients[0].shape[:-1], x.shape[-1])
            reduce_scatter = start_reduce_scatter(ctx.group, full_gradient, sequence)
        weight_gradients: list[torch.Tensor | None] = [None] * len(weights)
        if gather is not None:
            weight_gradients = _weight_gradients(gather(), flats, needs_weights, ctx.is_transposed)
        return None, None, None, None if reduce_scatter is None else reduce_scatter(), *weight_gradients
