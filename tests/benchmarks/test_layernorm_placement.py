"""benchmarks/bench_layernorm_placement.py, by its command line."""

from __future__ import annotations

from pathlib import Path

from benchmarks.bench_layernorm_placement import main
from benchmarks.records import read


def test_it_measures_and_draws(tmp_path: Path) -> None:
    """Catches a benchmark that no longer runs, or that trains both placements as one."""
    main(["--quick", "--workers", "1", "--output", str(tmp_path)])
    runs = read(tmp_path / "layernorm_placement.json")["runs"]
    assert [(run["panel"]["layers"], run["placement"]) for run in runs] == [
        (2, "post"),
        (2, "pre"),
        (1, "post"),
        (1, "pre"),
    ]
    assert len({tuple(run["masked_lm_loss"]) for run in runs}) == 4
    assert all(len(run["masked_lm_loss"]) == len(run["sentence_order_loss"]) == 3 for run in runs)
    image = (tmp_path / "layernorm_placement.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
