"""Asynchronous collectives over a tensor-parallel group: start now, wait later.

Each function returns a function that waits; call it exactly once. Compilers schedule operations themselves and have no
work handles: under ``torch.compile``, the collective is complete when the first function returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from hf_megatron.partition import chunk_range
from hf_megatron.tensor_parallel.cpu import wait_for
from hf_megatron.tensor_parallel.group import TensorParallelGroup

# torch 2.13 renamed them and warns about the old names.
if hasattr(dist, "all_gather_single"):
    _all_gather_single, _reduce_scatter_single = dist.all_gather_single, dist.reduce_scatter_single
else:
    _all_gather_single, _reduce_scatter_single = dist.all_gather_into_tensor, dist.reduce_scatter_tensor


def start_all_reduce(
    group: TensorParallelGroup, tensor: torch.Tensor, *, is_async: bool = True
) -> Callable[[], object]:
    """Start an all-reduce in place of a contiguous partial sum, which is neither read nor written until it is whole.

    ``is_async``, here and below: whether to overlap with other work. If not, a GPU saves the events that synchronize
    its streams.
    """
    return _start(dist.all_reduce, tensor, group=group, is_async=is_async)


def start_all_gather(
    group: TensorParallelGroup, shard: torch.Tensor, dim: int, size: int, *, is_async: bool = True
) -> Callable[[], torch.Tensor]:
    """Start an all-gather of shards that may differ in size: padded to the largest, gathered, trimmed.

    The shards are split on ``dim``, not negative, as ``torch.chunk`` cuts ``size``. What waits has the full tensor.
    """
    sent = _padded(shard, dim, chunk_range(size, group.size, 0)[1]).contiguous()
    gathered = sent.new_empty((group.size * sent.shape[0], *sent.shape[1:]))
    wait = _start(_all_gather_single, gathered, sent, group=group, is_async=is_async)

    def finish() -> torch.Tensor:
        wait()
        # A copy, unless the dim is the first; the padding is all at the end.
        in_order = gathered.view(group.size, *sent.shape).movedim(0, dim).flatten(dim, dim + 1)
        return in_order.narrow(dim, 0, size)

    return finish


def start_reduce_scatter(
    group: TensorParallelGroup, tensor: torch.Tensor, dim: int, *, is_async: bool = True
) -> Callable[[], torch.Tensor]:
    """Start a reduce-scatter of slices that may differ in size: padded with zeros, reduced, trimmed.

    The tensor is a partial sum, left as it is. What waits has this rank's slice of the sum along ``dim``, not negative,
    as ``torch.chunk`` cuts it.
    """
    largest = chunk_range(tensor.shape[dim], group.size, 0)[1]
    slices: torch.Tensor = _padded(tensor, dim, group.size * largest).unflatten(dim, (group.size, largest))
    sent = slices.movedim(dim, 0).contiguous()  # in a row; a copy, unless the dim is the first
    total = sent.new_empty(sent.shape[1:])
    wait = _start(_reduce_scatter_single, total, sent.flatten(0, 1), group=group, is_async=is_async)
    start, stop = chunk_range(tensor.shape[dim], group.size, group.rank)

    def finish() -> torch.Tensor:
        wait()
        return total.narrow(dim, 0, stop - start).contiguous()

    return finish


def exchange_with_neighbours(
    group: TensorParallelGroup, tensors: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send to the ranks before and after this one, and receive from them.

    Args:
        group: The tensor-parallel group.
        tensors: What goes to the rank before and to the rank after; empty where there is none.
        shapes: Shape of what comes from the rank before, and of what comes from the rank after.

    Returns:
        What came from the rank before, and what came from the rank after.
    """
    sent = torch.cat([tensor.reshape(-1) for tensor in tensors])
    sizes = [math.prod(shape) for shape in shapes]
    received = sent.new_empty(sum(sizes))

    def by_rank(before: int, after: int) -> list[int]:
        return [{group.rank - 1: before, group.rank + 1: after}.get(rank, 0) for rank in range(group.size)]

    # An all-to-all in which only neighbours have something for each other: one batch of sends and receives in NCCL.
    exchange = partial(
        dist.all_to_all_single,
        output_split_sizes=by_rank(*sizes),
        input_split_sizes=by_rank(*(tensor.numel() for tensor in tensors)),
    )
    _start(exchange, received, sent, group=group, is_async=False)()
    before, after = received.split(sizes)
    return before.view(*shapes[0]), after.view(*shapes[1])


def all_gather_stacked(group: TensorParallelGroup, tensor: torch.Tensor) -> torch.Tensor:
    """All-gather tensors of equal shape: [P, *tensor.shape]."""
    if group.size == 1:
        return tensor[None]
    gathered = tensor.new_empty((group.size * tensor.shape[0], *tensor.shape[1:]))
    _start(_all_gather_single, gathered, tensor, group=group, is_async=False)()
    return gathered.view(group.size, *tensor.shape)


def _padded(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The tensor, with zeros at the end of ``dim`` up to ``size``."""
    missing = list(tensor.shape)
    missing[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim) if missing[dim] else tensor


def _start(
    collective: Callable[..., Any], *tensors: torch.Tensor, group: TensorParallelGroup, is_async: bool
) -> Callable[[], object]:
    is_compiling = torch.compiler.is_compiling()
    if tensors[0].device.type == "cpu" and not is_compiling:
        aliases = [tensor.detach() for tensor in tensors]  # held only by the collective
        unfinished = [collective(*aliases, group=group.process_group, async_op=True)]
        return lambda: wait_for(unfinished.pop(), aliases, group.size)
    work = collective(*tensors, group=group.process_group, async_op=is_async and not is_compiling)
    return (lambda: None) if work is None else work.wait
