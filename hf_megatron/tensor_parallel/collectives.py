"""Collectives over a tensor-parallel group that are begun now and waited for later.

Each function returns another, which waits. A compiler orders things itself and knows no handles of work in progress:
under ``torch.compile`` the collective is done when the first function returns, and the second has nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from hf_megatron.tensor_parallel.group import TensorParallelGroup

__all__ = ["start_all_gather_single", "start_all_reduce", "start_reduce_scatter_single"]

# torch 2.13 renamed them and warns about the old names.
if hasattr(dist, "all_gather_single"):
    _all_gather_single, _reduce_scatter_single = dist.all_gather_single, dist.reduce_scatter_single
else:
    _all_gather_single, _reduce_scatter_single = dist.all_gather_into_tensor, dist.reduce_scatter_tensor


def start_all_reduce(
    group: TensorParallelGroup,
    tensor: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    *,
    is_async: bool = True,
) -> Callable[[], object]:
    """Begin to sum over ranks, in place.

    Args:
        group: The tensor-parallel group.
        tensor: A partial sum, contiguous; the sum, replicated, once the wait is over.
        op: What to compute instead of a sum.
        is_async: Whether there is something to do meanwhile. If not, a GPU spares the events that order its streams.

    Returns:
        A function that waits. Until then the tensor is neither read nor written.
    """
    return _start(dist.all_reduce, tensor, op=op, group=group, is_async=is_async)


def start_all_gather_single(
    group: TensorParallelGroup, gathered: torch.Tensor, tensor: torch.Tensor, *, is_async: bool = True
) -> Callable[[], object]:
    """Begin to gather the ranks' tensors, all of one shape, one after the other along the first dim of ``gathered``.

    Arguments and what is returned are as for :func:`start_all_reduce`.
    """
    return _start(_all_gather_single, gathered, tensor, group=group, is_async=is_async)


def start_reduce_scatter_single(
    group: TensorParallelGroup, total: torch.Tensor, tensor: torch.Tensor, *, is_async: bool = True
) -> Callable[[], object]:
    """Begin to sum over ranks; of the sum's equal parts along its first dim ``total`` gets this rank's.

    Arguments and what is returned are as for :func:`start_all_reduce`.
    """
    return _start(_reduce_scatter_single, total, tensor, group=group, is_async=is_async)


def _start(
    collective: Callable[..., Any], *tensors: torch.Tensor, group: TensorParallelGroup, is_async: bool, **options: Any
) -> Callable[[], object]:
    is_async = is_async and not torch.compiler.is_compiling()
    work = collective(*tensors, group=group.process_group, async_op=is_async, **options)
    return _nothing if work is None else work.wait


def _nothing() -> None:
    pass
