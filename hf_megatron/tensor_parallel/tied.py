"""The gradient of a weight that embeds words and predicts them, in one piece.

Shapes: V_p rows of the vocabulary on this rank, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def tied_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One weight twice, for :func:`sparse_lookup` and for a head.

    Args:
        weight: [V_p, H], split on dim 0.

    Returns:
        The weight for lookups and the weight for the head, both [V_p, H]. The gradient of the head's becomes that of
        the weight, with the lookups' added in place: nothing else may hold on to it.
    """
    for_lookups, for_head = _TiedRows.apply(weight)
    return for_lookups, for_head


def sparse_lookup(weight: torch.Tensor, rows: torch.Tensor, padding: int | None) -> torch.Tensor:
    """``torch.nn.functional.embedding`` whose gradient is sparse; for a weight of :func:`tied_rows`.

    Args:
        weight: [V_p, H], split on dim 0.
        rows: [...], the rows to look up.
        padding: A row that gets no gradient.

    Returns:
        [..., H].
    """
    embedded: torch.Tensor = _SparseLookup.apply(weight, rows, padding)
    return embedded


class _TiedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, of_lookups: torch.Tensor | None, of_head: torch.Tensor | None) -> torch.Tensor | None:
        if of_lookups is None or of_head is None:
            return of_head if of_lookups is None else of_lookups.to_dense()
        return of_head.add_(of_lookups)


class _SparseLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rows: torch.Tensor, padding: int | None) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.padding, ctx.shape = padding, weight.shape
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        rows, values = rows.reshape(-1), gradient.reshape(-1, gradient.shape[-1])
        if ctx.padding is not None:
            is_word = rows != ctx.padding
            rows, values = rows[is_word], values[is_word]
        return torch.sparse_coo_tensor(rows[None], values, ctx.shape, check_invariants=False), None, None
