"""benchmarks/bench_wikitext103.py, by its command line, and what its last whole run found."""

from __future__ import annotations

import json
import runpy

import pytest

from tests.repository import ROOT

_SCRIPT = ROOT / "benchmarks/bench_wikitext103.py"


def test_it_measures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a benchmark that no longer runs."""
    monkeypatch.setattr("sys.argv", [str(_SCRIPT), "--quick"])
    runpy.run_path(str(_SCRIPT), run_name="__main__")
    report = json.loads(capsys.readouterr().out)
    assert report["ratio"] == report["seconds_per_window"]["loop"] / report["seconds_per_window"]["evaluation"]
    assert report["loop_windows"] == 4


def test_the_committed_run_is_three_times_faster_than_the_loop() -> None:
    """Catches figures of a setting other than the one that is promised, or that do not keep the promise."""
    report = json.loads((ROOT / "benchmarks/results/wikitext103.json").read_text(encoding="utf-8"))
    setting = report["setting"]
    assert (setting["hidden"], setting["layers"], setting["tokens"]) == (256, 4, 20_000)
    assert report["ratio"] >= 3
