"""A product and the collective beside it as one operation, over torch's symmetric memory; for sequence parallelism.

The ranks of a node read each other's memory, piece by piece, and multiply one piece while the next one comes. It is
used on GPUs if the environment variable HF_MEGATRON_SYMMETRIC_MEMORY=1 is set, on all ranks. The plain form, a
collective and then a product, is the reference; results are equal up to rounding.

Shapes: P ranks, S sequence, a multiple of P, S_p = S / P, k and n sizes of a matrix on this rank.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_megatron.tensor_parallel.collectives import start_all_gather
from hf_megatron.tensor_parallel.group import TensorParallelGroup

_IS_ASKED_FOR = os.environ.get("HF_MEGATRON_SYMMETRIC_MEMORY") == "1"
if _IS_ASKED_FOR:
    import torch.distributed._symmetric_memory  # has the operations


def is_used(group: TensorParallelGroup, x: torch.Tensor, length: int) -> bool:
    """Whether it is used for an input ``x`` of a sequence of ``length``; the operations know no padding."""
    return _IS_ASKED_FOR and x.is_cuda and length % group.size == 0


def gather_and_multiply(group: TensorParallelGroup, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """[S_p, ..., k], split on dim 0, to [S, ..., n], split on the last dim like the matrix [k, n].

    Collective: all-gather over tp, forward; reduce-scatter and, for the gradient of the matrix, all-gather, backward.
    """
    product: torch.Tensor = _GatherAndMultiply.apply(x, matrix, group)
    return product


def multiply_and_reduce_scatter(
    group: TensorParallelGroup, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """[S, ..., k] and a matrix [k, n], both split on k, to [S_p, ..., n], split on dim 0, with the bias [n] added.

    The gradient of the bias, which is replicated, is whole.

    Collective: reduce-scatter over tp, forward; all-gather over tp, backward.
    """
    total: torch.Tensor = _MultiplyAndReduceScatter.apply(x, matrix, bias, group)
    return total


def _gathered_product(
    group: TensorParallelGroup, x: torch.Tensor, matrix: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is gathered from [S_p, ..., k], and its product."""
    name = group.process_group.group_name  # type: ignore[union-attr]
    whole, products = torch.ops.symm_mem.fused_all_gather_matmul(x.contiguous(), [matrix], 0, name)
    return whole, products[0]


def _scattered_product(group: TensorParallelGroup, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    name = group.process_group.group_name  # type: ignore[union-attr]
    total: torch.Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(x.contiguous(), matrix, "sum", 0, name)
    return total


def _gradient_of(matrix: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Of a matrix by which [..., k] was multiplied, in the order of memory that the matrix has."""
    rows, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
    return rows.t() @ gradient if matrix.is_contiguous() else (gradient.t() @ rows).t()


class _GatherAndMultiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
        ctx.group = group
        ctx.save_for_backward(x, matrix)
        return _gathered_product(group, x, matrix)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        of_x = of_matrix = None
        again = start_all_gather(ctx.group, x, 0, gradient.shape[0]) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[0]:
            of_x = _scattered_product(ctx.group, gradient, matrix.t())
        if again is not None:
            of_matrix = _gradient_of(matrix, again(), gradient)
        return of_x, of_matrix, None


class _MultiplyAndReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, group: TensorParallelGroup
    ) -> torch.Tensor:
        ctx.group = group
        ctx.save_for_backward(x, matrix)
        total = _scattered_product(group, x, matrix)
        return total if bias is None else total.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        whole, of_x = _gathered_product(ctx.group, gradient, matrix.t())
        of_matrix = _gradient_of(matrix, x, whole) if ctx.needs_input_grad[1] else None
        of_bias = whole.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_matrix, of_bias, None
