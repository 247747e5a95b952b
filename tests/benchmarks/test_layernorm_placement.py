"""benchmarks/bench_layernorm_placement.py, by its command line."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.repository import ROOT

_SCRIPT = ROOT / "benchmarks/bench_layernorm_placement.py"
_RESULTS = ROOT / "benchmarks/results/layernorm_placement.json"


def test_it_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a benchmark that no longer runs, or that trains both placements as one."""
    monkeypatch.setattr("sys.argv", [str(_SCRIPT), "--quick", "--workers", "1", "--output", str(tmp_path)])
    runpy.run_path(str(_SCRIPT), run_name="__main__")
    results = json.loads((tmp_path / _RESULTS.name).read_text(encoding="utf-8"))
    runs = results["runs"]
    assert [(run["panel"]["layers"], run["placement"]) for run in runs] == [
        (2, "post"),
        (2, "pre"),
        (1, "post"),
        (1, "pre"),
    ]
    assert len({tuple(run["masked_lm_loss"]) for run in runs}) == 4
    assert all(len(run["masked_lm_loss"]) == len(run["sentence_order_loss"]) == 3 for run in runs)
    image = (tmp_path / _RESULTS.name).with_suffix(".png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
