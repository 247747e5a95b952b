"""The scripts of benchmarks/, each by its command line on something small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import (
    bench_decoding,
    bench_layernorm_placement,
    bench_loading,
    bench_loss_gradient,
    bench_rank_checks,
    bench_recomputation,
    bench_wikitext103,
)
from benchmarks.records import read


def _layernorm_placement(output: Path, out: str) -> None:
    """Catches both placements trained as one."""
    runs = read(output / "layernorm_placement.json")["runs"]
    expected = [(2, "post"), (2, "pre"), (1, "post"), (1, "pre")]
    assert [(run["panel"]["layers"], run["placement"]) for run in runs] == expected
    assert len({tuple(run["masked_lm_loss"]) for run in runs}) == 4
    assert all(len(run["masked_lm_loss"]) == len(run["sentence_order_loss"]) == 3 for run in runs)
    image = (output / "layernorm_placement.png").read_bytes()
    assert (image[:4], len(image) > 10_000) == (b"\x89PNG", True)


def _wikitext103(output: Path, out: str) -> None:
    """Catches a ratio the wrong way round."""
    report = json.loads(out)
    seconds = report["seconds_per_window"]
    assert report["ratio"] == pytest.approx(seconds["loop"] / seconds["evaluation"], rel=1e-4)
    assert report["loop_windows"] == 4


def _decoding(output: Path, out: str) -> None:
    """Catches competitors that decode different tokens, which the script refuses."""
    assert "times the tokens per second" in (output / "decoding.md").read_text()


def _loading(output: Path, out: str) -> None:
    """Catches a way of loading that is not measured."""
    assert (output / "loading.md").read_text().count("| ours-tp") == 3


def _recomputation(output: Path, out: str) -> None:
    """Catches a table that lacks a line, and choices that compute something else, which the script refuses."""
    lines = (output / "recomputation.md").read_text().splitlines()
    assert sum(line.startswith("| bf16 autocast |") for line in lines) == 4


def _loss_gradient(output: Path, out: str) -> None:
    """Catches gradients that are less exact than stock's."""
    assert max(row["ratio"] for row in read(output / "loss_gradient.json")["rows"]) < 1.1


def _rank_checks(output: Path, out: str) -> None:
    """Catches a comparison of ranks that is not measured."""
    assert read(output / "rank_checks.json")["seconds"]["exchange"] > 0


@pytest.mark.parametrize(
    ("main", "arguments", "check"),
    [
        (bench_layernorm_placement.main, ["--workers", "1"], _layernorm_placement),
        (bench_wikitext103.main, [], _wikitext103),
        pytest.param(bench_decoding.main, [], _decoding, marks=pytest.mark.slow),
        pytest.param(bench_loading.main, [], _loading, marks=pytest.mark.slow),
        pytest.param(
            bench_recomputation.main, ["--precisions", "bf16 autocast"], _recomputation, marks=pytest.mark.slow
        ),
        pytest.param(bench_loss_gradient.main, [], _loss_gradient, marks=pytest.mark.slow),
        pytest.param(bench_rank_checks.main, [], _rank_checks, marks=pytest.mark.slow),
    ],
    ids=["layernorm_placement", "wikitext103", "decoding", "loading", "recomputation", "loss_gradient", "rank_checks"],
)
def test_it_measures(
    main: Callable[[list[str]], None],
    arguments: list[str],
    check: Callable[[Path, str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a benchmark that no longer runs, and what its own check says."""
    main(["--quick", *arguments, "--output", str(tmp_path)])
    check(tmp_path, capsys.readouterr().out)
