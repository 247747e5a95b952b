"""benchmarks/bench_wikitext103.py, by its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench_wikitext103 import main


def test_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a benchmark that no longer runs."""
    main(["--quick", "--output", str(tmp_path)])
    report = json.loads(capsys.readouterr().out)
    seconds = report["seconds_per_window"]
    assert report["ratio"] == pytest.approx(seconds["loop"] / seconds["evaluation"], rel=1e-4)
    assert report["loop_windows"] == 4
