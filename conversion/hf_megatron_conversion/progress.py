"""How long-running functions say how far they are."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one task after the other."""

    def begin(self, task: str, total_bytes: int) -> None:
        """A task starts that will handle this many bytes."""

    def advance(self, num_bytes: int) -> None:
        """The task has handled this many more bytes."""


class Silent:
    """Tells nobody."""

    def begin(self, task: str, total_bytes: int) -> None:
        """Ignored."""

    def advance(self, num_bytes: int) -> None:
        """Ignored."""
