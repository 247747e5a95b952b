"""The machine: what it is, and how busy others keep it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["ForeignLoad", "processor_seconds_of", "waited_seconds_of"]

_TICKS = os.sysconf("SC_CLK_TCK")  # per second; what the kernel counts processor time in


class ForeignLoad:
    """How many processor cores were busy with anything but ours, on average, since this was made.

    Args:
        own_seconds: Tells the processor time that is ours.
    """

    def __init__(self, own_seconds: Callable[[], float]) -> None:
        self._own_seconds = own_seconds
        self._started, self._foreign = time.monotonic(), _busy_seconds() - own_seconds()

    def cores(self) -> float:
        """Cores; from ticks of 10 ms, so that a short time gives a coarse number."""
        foreign = _busy_seconds() - self._own_seconds() - self._foreign
        return max(0.0, foreign) / max(time.monotonic() - self._started, 1 / _TICKS)


def processor_seconds_of(pid: int) -> float:
    """Processor time of a process since it started; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def waited_seconds_of(pid: int) -> float:
    """Time that threads of a process were ready to run and had no core, as far as its living threads go."""
    waited = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            waited += int(file.read_text().split()[1])
    return waited / 1e9


def _busy_seconds() -> float:
    """Processor time that the whole machine has spent, without what was idle or waiting for a disk."""
    first_line = Path("/proc/stat").read_text().split("\n", 1)[0]
    user, nice, system, _, _, *interrupts = map(int, first_line.split()[1:9])
    return (user + nice + system + sum(interrupts)) / _TICKS
