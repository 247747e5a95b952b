"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.peers.rounds import Spread

__all__ = ["MEGA", "machine", "milliseconds", "quartiles", "table"]

MEGA = 1e6


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, numbers to the right; nothing if it has no rows."""
    lines = [" | ".join(row) for row in rows]
    if not lines:
        return ""
    ruler = " | ".join(["---"] + ["---:"] * (len(head) - 1))
    return "\n".join(f"| {line} |" for line in [" | ".join(head), ruler, *lines])


def machine(environment: Mapping[str, Any]) -> str:
    """What the numbers were measured on, and with."""
    device = environment.get("device") or environment["processor"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{device}, {environment['cores']} cores; {versions}."


def milliseconds(seconds: float) -> str:
    """Whole milliseconds; more digits of few."""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.01 else f"{seconds * 1e3:.2f}"


def quartiles(spread: Spread, number_of_digits: int = 3) -> str:
    """The middle half; nothing of a single number."""
    return f"{spread.low:.{number_of_digits}f} to {spread.high:.{number_of_digits}f}" if spread.count > 1 else ""
