"""What the command line shows: progress and messages on stderr, results on stdout."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object to stdout.")]

_MAX_LISTED = 20


class ProgressBar:
    """A bar on stderr for each task, with speed and remaining time."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def begin(self, task: str, total_bytes: int) -> None:
        self._task = self._bars.add_task(task, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        assert self._task is not None, "begin comes before advance"
        self._bars.advance(self._task, num_bytes)


@contextmanager
def progress_bar() -> Iterator[ProgressBar]:
    """Bars that live until the context is left; none where stderr is not a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=console, disable=not console.is_terminal) as bars:
        yield ProgressBar(bars)


@contextmanager
def token_progress() -> Iterator[Callable[[int, int, int], None]]:
    """A bar with tokens per second and remaining time, which is told (done, total, tokens); none without a terminal."""
    console, began = Console(stderr=True), time.monotonic()
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("tokens", total=None)

        def show(done: int, total: int, tokens: int) -> None:
            speed = tokens / max(time.monotonic() - began, 1e-9)
            bars.update(task, completed=done, total=total, description=f"{tokens:,} tokens, {speed:,.0f} per second")

        yield show


def printable(text: str) -> str:
    """Text with control characters, and others that nobody sees, spelled out; it may come from a file of anybody's."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def messages_to_stderr() -> None:
    """Show what the library logs, from INFO upwards."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    for name in ("hf_megatron", "hf_megatron_conversion"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)


def print_json(result: Mapping[str, object]) -> None:
    """Print one JSON object to stdout."""
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")


def print_message(message: str) -> None:
    """Print a line to stderr."""
    Console(stderr=True).print(Text(printable(message)), soft_wrap=True)


def print_error(message: str, kind: str, *, as_json: bool) -> None:
    """Print an error to stderr, and with ``as_json`` as one JSON object to stdout too."""
    Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), printable(message)), soft_wrap=True)
    if as_json:
        print_json({"error": message, "error_type": kind})


def report(
    title: str,
    result: Mapping[str, object],
    as_json: bool,
    *,
    shown: Mapping[str, object] | None = None,
    ok: bool = True,
) -> int:
    """Print a result to stdout, as JSON or as a table of ``shown``, and return the exit code: 1 if it is not ``ok``."""
    if as_json:
        print_json(result)
        return 0 if ok else 1
    table = Table("", "", show_header=False)
    for name, value in (result if shown is None else shown).items():
        table.add_row(Text(printable(name.replace("_", " "))), Text(printable(_cell(value))))
    # Not as the table's title, which is broken where the table ends.
    console = Console()
    console.print(Text(printable(title), style="bold"), soft_wrap=True)
    console.print(table)
    return 0 if ok else 1


def human_bytes(num_bytes: int) -> str:
    """``1,234,567 (1.2 MB)``."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if num_bytes >= 1000**power:
            return f"{num_bytes:,} ({num_bytes / 1000**power:.1f} {unit})"
    return f"{num_bytes:,}"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        more = [f"and {len(value) - _MAX_LISTED} more"] if len(value) > _MAX_LISTED else []
        return "\n".join([*map(str, value[:_MAX_LISTED]), *more]) or "-"
    return str(value)
