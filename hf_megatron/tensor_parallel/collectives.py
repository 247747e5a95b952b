"""Collectives over a tensor-parallel group that are begun now and waited for later.

Each function returns another, which waits, once. A compiler orders things itself and knows no handles of work in
progress: under ``torch.compile`` the collective is done when the first function returns, and the second has nothing to
wait for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from hf_megatron.tensor_parallel.group import TensorParallelGroup

# How long a rank on a CPU asks whether a collective is done before it sleeps until it is. Gloo sums a few kilobytes in
# less time than a thread needs to be put to sleep and woken, which decoding would pay ten times a token. Who waits
# longer than this waits for the work of another rank. Where ranks outnumber the cores they all sleep: each that asks
# would keep another from computing.
POLLING_SECONDS = 10e-3
# How long a rank waits for gloo's thread to let go of the tensors of a collective that is done, see `_WorkOnCPU`.
RELEASE_SECONDS = 1.0
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

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
    if tensors[0].device.type == "cpu" and not torch.compiler.is_compiling():
        # Aliases, which nobody but the collective holds.
        aliases = [tensor.detach() for tensor in tensors]
        return _WorkOnCPU(collective(*aliases, group=group.process_group, async_op=True, **options), aliases, group)
    is_async = is_async and not torch.compiler.is_compiling()
    work = collective(*tensors, group=group.process_group, async_op=is_async, **options)
    return _nothing if work is None else work.wait


def _nothing() -> None:
    pass


class _WorkOnCPU:
    """Waits until gloo has done a collective, and has let go of its tensors.

    Gloo works on a thread of its own, which holds the tensors for a moment after it has called the work done. If that
    thread is the last to hold one it has to delete a Python object, and if the process ends just then, it takes the
    process down: "terminate called without an active exception" (pytorch issue 190489).

    The work's future is asked, not the work: ``Work.is_completed`` takes a lock without giving up Python's own, and
    under a profiler the thread may hold the first while it waits for the second, forever.

    Args:
        work: The handle of the collective.
        aliases: The tensors that it was called with, held by nobody else.
        group: The tensor-parallel group.
    """

    def __init__(self, work: dist.Work, aliases: Sequence[torch.Tensor], group: TensorParallelGroup) -> None:
        self._work: dist.Work | None = work
        self._aliases = aliases
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", group.size))
        self._polling_seconds = POLLING_SECONDS if ranks_here <= _CORES else 0.0

    def __call__(self) -> None:
        work, self._work = self._work, None
        assert work is not None, "a collective is waited for once"
        with suppress(RuntimeError):  # not implemented by gloo's reduce-scatter
            _ask_until(work.get_future().done, self._polling_seconds)
        work.wait()  # sleeps if it has to, and raises what went wrong
        del work
        _ask_until(self._is_released, RELEASE_SECONDS)

    def _is_released(self) -> bool:
        counts = (alias._use_count() for alias in self._aliases)  # type: ignore[attr-defined]
        return all(count == 1 for count in counts)  # ours


def _ask_until(is_true: Callable[[], bool], seconds: float) -> None:
    """Ask until it is so or the time is over, and let others have the core in between."""
    end = time.perf_counter() + seconds
    while not is_true() and time.perf_counter() < end:
        _give_way()


def _give_way() -> None:
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    time.sleep(0)  # gives up Python's lock, which gloo's thread may need too; before 3.12 the line above does not
