"""Signals that ask a run to stop: a scheduler sends them before it takes the machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

# SIGTERM: torchrun passes it on, and so do Kubernetes and Slurm. SIGUSR1: what users ask Slurm for (--signal).
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Context manager within which the signals are remembered in ``received`` instead of ending the process.

    A handler of the user's own stays; outside of the main thread, Python can set none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._previous[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
