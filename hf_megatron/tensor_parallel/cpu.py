"""What pays on CPUs only, where the code is tested and small models are trained. GPUs take none of these paths.

One switch, ``TUNED``, turns all of it off; the environment variable HF_MEGATRON_CPU_TUNING=0 does the same.

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

TUNED = os.environ.get("HF_MEGATRON_CPU_TUNING") != "0"

# How long a rank polls a collective before it sleeps. Gloo sums a few kilobytes in less time than a thread takes to be
# put to sleep and woken, which a decoded token would pay ten times. Who waits longer than this waits for another rank's
# work. Where ranks outnumber the cores they all sleep at once: a polling rank would keep another from computing.
POLLING_SECONDS = 10e-3
# How long a rank waits for gloo's thread to let go of the tensors of a finished collective, see `wait_for`.
RELEASE_SECONDS = 1.0
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Logits worked on at a time, so that they stay in the cache from one operation to the next.
_LOGITS_PER_BLOCK = 2**18


def is_tuned(tensor: torch.Tensor) -> bool:
    """Whether to take the paths of this file for a tensor."""
    return TUNED and tensor.is_cpu and not torch.compiler.is_compiling()


def wait_for(work: dist.Work, aliases: Sequence[torch.Tensor], group_size: int) -> None:
    """Wait until gloo has finished a collective and has let go of its tensors.

    Gloo works on a thread of its own, which holds the tensors for a moment after it has called the work done. If that
    thread is the last to hold one it has to delete a Python object, and if the process ends just then, it takes the
    process down: "terminate called without an active exception" (pytorch issue 190489).

    Args:
        work: The handle of the collective.
        aliases: The tensors that it was called with, held by nobody else.
        group_size: Number of ranks in the group.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", group_size))
    with suppress(RuntimeError):  # not implemented by gloo's reduce-scatter
        # Not work.is_completed, which takes a lock without giving up Python's own: under a profiler the thread may hold
        # the first while it waits for the second, forever.
        _poll(work.get_future().done, POLLING_SECONDS if TUNED and ranks_here <= _CORES else 0.0)
    work.wait()  # sleeps if it has to, and raises what went wrong
    del work
    _poll(lambda: all(alias._use_count() == 1 for alias in aliases), RELEASE_SECONDS)  # type: ignore[attr-defined]


def _poll(is_true: Callable[[], bool], seconds: float) -> None:
    """Ask until it is so or the time is over, and let others have the core in between."""
    end = time.perf_counter() + seconds
    while not is_true() and time.perf_counter() < end:
        if hasattr(os, "sched_yield"):
            os.sched_yield()
        time.sleep(0)  # gives up Python's lock, which gloo's thread may need too; before 3.12 the line above does not


def row_blocks(logits: torch.Tensor) -> list[slice]:
    """The rows of [T, V_p] logits to work on together: all of them, or on a CPU as many as its cache holds."""
    count = logits.shape[0]
    if not is_tuned(logits):
        return [slice(0, count)]
    size = max(1, _LOGITS_PER_BLOCK // logits.shape[1])
    return [slice(first, first + size) for first in range(0, max(count, 1), size)]


class TiedGradient:
    """Puts the gradient of a weight that embeds words and predicts them together, in the memory of the head's part.

    The lookups' part is a few rows. As a tensor of its own, mostly zeros, it would take as long to fill and to add as a
    layer takes to compute; torch's engine adds a sparse one to a new copy of the head's, which costs the same.

    One call of a model makes one. The head, which comes first in the backward pass, hands its part over with
    :meth:`put`; the lookups add theirs to it, and give autograd the sum.

    Args:
        weight: [V_p, H], split on dim 0; a plain tensor.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self._of_head: torch.Tensor | None = None

    def put(self, gradient: torch.Tensor) -> None:
        """Hand over the head's part [V_p, H], which nobody else may hold."""
        self._of_head = gradient

    def take(self) -> torch.Tensor | None:
        """The head's part, if it has been handed over since the last time."""
        gradient, self._of_head = self._of_head, None
        return gradient

    def look_up(self, rows: torch.Tensor, padding: int | None) -> torch.Tensor:
        """``torch.nn.functional.embedding`` of rows [...], of which ``padding`` gets no gradient: [..., H]."""
        embedded: torch.Tensor = _Lookup.apply(self, self.weight, rows, padding)
        return embedded


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tied: TiedGradient, weight: torch.Tensor, rows: torch.Tensor, padding: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.tied, ctx.padding, ctx.shape = tied, padding, weight.shape
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        rows, values = rows.reshape(-1), gradient.reshape(-1, gradient.shape[-1])
        if ctx.padding is not None:
            is_word = rows != ctx.padding
            rows, values = rows[is_word], values[is_word]
        total = ctx.tied.take()
        if total is None:  # the loss does not come from the head
            total = values.new_zeros(ctx.shape)
        return None, total.index_add_(0, rows, values.to(total.dtype)), None, None
