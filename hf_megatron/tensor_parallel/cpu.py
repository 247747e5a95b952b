"""CPU-only optimizations, for tests and for training small models. GPUs use none of them.

``TUNED = False`` or the environment variable HF_MEGATRON_CPU_TUNING=0 disables all of them.

Shapes: V_p rows of the vocabulary on this rank, H hidden.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

TUNED = os.environ.get("HF_MEGATRON_CPU_TUNING") != "0"

# How long a rank polls a collective before it sleeps. Gloo reduces a few kilobytes faster than a thread sleeps and
# wakes, and decoding waits ten times per token. Longer waits are for another rank's computation. If ranks outnumber
# cores, they sleep at once, because a polling rank would take a core from a computing one.
POLLING_SECONDS = 10e-3
# How long a rank waits for gloo's thread to release the tensors of a finished collective; see `wait_for`.
RELEASE_SECONDS = 1.0
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Number of logits per block, chosen so that a block stays in the cache between operations.
_LOGITS_PER_BLOCK = 2**18


def is_tuned(tensor: torch.Tensor) -> bool:
    """Whether to use the optimizations of this file for a tensor."""
    return TUNED and tensor.is_cpu and not torch.compiler.is_compiling()


def wait_for(work: dist.Work, aliases: Sequence[torch.Tensor], group_size: int) -> None:
    """Wait until gloo has finished a collective and released its tensors.

    Gloo runs on its own thread, which holds references to the tensors for a moment after the work is done. If it holds
    the last reference, it must delete a Python object, for which it takes the GIL, perhaps with a lock that another
    thread waits for; and if the process exits at that moment, it crashes with "terminate called without an active
    exception" (pytorch issue 190489). ``aliases`` are the tensors that the collective was called with, held by nobody
    else.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", group_size))
    with suppress(RuntimeError):  # not implemented by gloo's reduce-scatter
        # work.is_completed would take a lock while holding the GIL. Under a profiler, gloo's thread may hold that lock
        # while it waits for the GIL: a deadlock.
        _poll(work.get_future().done, POLLING_SECONDS if TUNED and ranks_here <= _CORES else 0.0)
    work.wait()  # sleeps if necessary, and raises errors of the collective
    del work
    _poll(lambda: all(alias._use_count() == 1 for alias in aliases), RELEASE_SECONDS)  # type: ignore[attr-defined]


def _poll(is_true: Callable[[], bool], seconds: float) -> None:
    """Poll until true or until the time is over, yielding the core in between."""
    end = time.perf_counter() + seconds
    while not is_true() and time.perf_counter() < end:
        if hasattr(os, "sched_yield"):
            os.sched_yield()
        time.sleep(0)  # releases the GIL, which gloo's thread may need; before Python 3.12 the line above does not


def row_blocks(logits: torch.Tensor) -> list[slice]:
    """Row blocks of [T, V_p] logits to process together: one block, or on a CPU blocks that fit the cache."""
    count = logits.shape[0]
    if not is_tuned(logits):
        return [slice(0, count)]
    size = max(1, _LOGITS_PER_BLOCK // logits.shape[1])
    return [slice(first, first + size) for first in range(0, max(count, 1), size)]


class TiedGradient:
    """Adds the gradients of a weight that embeds words and predicts them, in the memory of the head's gradient.

    The gradient of the lookups has a few rows. As a dense tensor, mostly zeros, it would take as long to fill and to
    add as a layer takes to compute; autograd adds a sparse one to a copy of the head's, which takes as long.

    Each forward of a model creates one, of the weight [V_p, H], split on dim 0, a plain tensor. The head multiplies
    with ``for_head``, and passes its gradient to :meth:`claim`.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._claimed: torch.Tensor | None = None
        self.for_lookups, self.for_head = _TwoUses.apply(self, weight)

    def look_up(self, rows: torch.Tensor, padding: int | None) -> torch.Tensor:
        """``F.embedding`` of rows [...], of which ``padding`` gets no gradient: [..., H]."""
        return F.embedding(rows, self.for_lookups, padding, sparse=True)

    def claim(self, gradient: torch.Tensor) -> None:
        """Allow to add to a gradient in place: the head has just created it, and nobody else holds it."""
        self._claimed = gradient


class _TwoUses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tied: TiedGradient, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.tied = tied
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_lookups: torch.Tensor | None, of_head: torch.Tensor | None
    ) -> tuple[None, torch.Tensor | None]:
        claimed, ctx.tied._claimed = ctx.tied._claimed, None
        if of_lookups is None or of_head is None:
            return None, of_head if of_lookups is None else of_lookups.to_dense()
        is_claimed = claimed is not None and claimed.data_ptr() == of_head.data_ptr()
        return None, of_head.add_(of_lookups) if is_claimed else of_head + of_lookups
