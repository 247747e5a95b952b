"""What a worker reads off itself: time, memory, collectives."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Clock", "Collectives", "peak_bytes", "start_peak"]

_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd", "_dtensor")
_SILENT = ("wait_tensor", "barrier")  # they carry nothing, as does what begins with _wrap


class Clock:
    """Seconds between moments, on the device that computes.

    On a GPU the moments are events in its stream, so that asking for one does not make the device wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[Any] = []

    def mark(self) -> None:
        """Note a moment."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between each moment and the next."""
        following = self._moments[1:]
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self._moments, following, strict=False)]
        return [b - a for a, b in zip(self._moments, following, strict=False)]


class Collectives(TorchDispatchMode):
    """Counts collectives, by torch.distributed or by DTensor, and the bytes of the tensors this rank puts in.

    Attributes:
        count: How many of each name.
        bytes: Their bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace in _NAMESPACES and name not in _SILENT and not name.startswith("_wrap"):
            # Operations of c10d that have an output and an input name them in this order; what travels is the input.
            given = args[1] if name.startswith(("_allgather_base", "_reduce_scatter_base", "allgather_")) else args[0]
            tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
            self.count[name.rstrip("_")] += 1
            self.bytes[name.rstrip("_")] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def start_peak(device: torch.device) -> int:
    """Give back what is free, and start a new maximum for :func:`peak_bytes`.

    Returns:
        Physical memory of this process now, its mapped files included.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed in pieces, until it is told to
    Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return _status("VmRSS")


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The most memory since :func:`start_peak`, by kind: ``resident``, and on a GPU ``allocated`` by torch."""
    peak = {"resident": _status("VmHWM")}
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak["allocated"] = torch.cuda.max_memory_allocated()
    return peak
