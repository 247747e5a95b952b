"""What the command lines of the scripts have in common."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.records import RESULTS

__all__ = ["add_fields", "fields_of", "make_parser", "parse"]

Setting = TypeVar("Setting")
_SWITCHES = {
    "quick": "measure something tiny, to see that it runs; the committed results stay",
    "redraw": "measure nothing, draw the data of an earlier run",
}


def make_parser(docstring: str | None, *switches: str) -> argparse.ArgumentParser:
    """A parser with ``--output`` and those of ``--quick`` and ``--redraw`` that a script has."""
    parser = argparse.ArgumentParser(description=(docstring or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory to write to")
    for switch in switches:
        parser.add_argument(f"--{switch}", action="store_true", help=_SWITCHES[switch])
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, name: str) -> tuple[Any, Path]:
    """The arguments, and the file for the record: ``NAME.json`` in ``--output``, which is made."""
    given = parser.parse_args(arguments)
    if getattr(given, "quick", False) and given.output == RESULTS:
        given.output = Path(tempfile.mkdtemp())  # the figures that are kept are those of a whole run
    file = given.output / f"{name}.json"
    if getattr(given, "redraw", False) and not file.exists():
        parser.error(f"there is no {file} to draw; measure first, without --redraw.")
    given.output.mkdir(parents=True, exist_ok=True)
    return given, file


def add_fields(parser: argparse.ArgumentParser, setting: type[Any]) -> None:
    """An option for each field of a dataclass of numbers, with its default."""
    for field in dataclasses.fields(setting):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)


def fields_of(given: argparse.Namespace, setting: type[Setting]) -> Setting:
    """The dataclass, from the options that ``add_fields`` added."""
    return setting(**{field.name: getattr(given, field.name) for field in dataclasses.fields(setting)})  # type: ignore[arg-type]
