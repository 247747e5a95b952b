"""Files of results and the command lines that all scripts share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.command_line import make_parser, parse
from benchmarks.records import RESULTS, environment, read, write


def test_records_come_back(tmp_path: Path) -> None:
    """Catches rounding that turns counts or names into something else, and curves over many lines."""
    file = tmp_path / "results.json"
    assert read(file) == {}
    record: dict[str, Any] = {"none": None, "empty": [], "runs": [{"name": "a, [b  c]", "loss": [1.5, 2e-9]}, 3]}
    write(file, {**record, "seconds": 0.123456789, "count": 1234567890, "pair": (True, "x")})
    assert read(file) == {**record, "seconds": 0.123457, "count": 1234567890, "pair": [True, "x"]}
    assert '\n   "loss": [1.5, 2e-09]\n' in file.read_text(encoding="utf-8")
    assert json.loads(file.read_text(encoding="utf-8")) == read(file)


def test_the_environment_names_what_was_asked_for() -> None:
    """Catches results that do not tell which torch they were measured with."""
    found = environment("torch")
    assert list(found["versions"]) == ["torch"]
    assert all(found[name] for name in ("processor", "cores", "system", "python"))


def test_a_quick_run_leaves_the_committed_results(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches a try-out that replaces the figures of a whole run, and one to draw that was never measured."""
    parser = make_parser("Measures.\n\nMore.", "quick", "redraw")
    assert parse(parser, [], "name")[1] == RESULTS / "name.json"
    assert parse(parser, ["--quick"], "name")[1].parent != RESULTS
    assert parse(parser, ["--quick", "--output", str(tmp_path)], "name")[1] == tmp_path / "name.json"
    with pytest.raises(SystemExit):
        parse(parser, ["--redraw", "--output", str(tmp_path)], "name")
    assert "measure first" in capsys.readouterr().err
