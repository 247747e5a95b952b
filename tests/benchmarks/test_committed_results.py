"""What benchmarks/README.md claims of committed results, and that these can be drawn again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    bench_finetune_squad,
    bench_layernorm_placement,
    bench_loss_gradient,
    bench_model_sizes,
    bench_pretrain_gpt2,
    bench_rank_checks,
    bench_training_step,
)
from benchmarks.peers.targets import reached
from benchmarks.records import RESULTS, read


def _check_finetune_squad(results: dict[str, Any]) -> None:
    """Both degrees learn the same, to the digit, and far more than chance."""
    one, two = results["runs"]
    assert one == {**two, "tp_size": 1}
    assert one["f1"] > 5 * results["chance_f1"]


def _check_layernorm_placement(results: dict[str, Any]) -> None:
    """At 24 layers only the rearranged BERT learns; at 4 layers both do."""
    last = {(r["panel"]["layers"], r["placement"], r["seed"]): r["masked_lm_loss"][-1] for r in results["runs"]}
    for seed in results["setting"]["seeds"]:
        assert last[4, "pre", seed] == pytest.approx(last[4, "post", seed], abs=0.1)
        assert last[24, "pre", seed] < last[24, "post", seed] - 0.3


def _check_model_sizes(results: dict[str, Any]) -> None:
    """From the middle on a larger model is better, and where the smaller one ends it has been before."""
    pairs = list(bench_model_sizes.overtaken(results["runs"]))
    assert len(pairs) == (len(results["setting"]["sizes"]) - 1) * len(results["setting"]["seeds"]) >= 4
    for larger, smaller, step in pairs:
        assert larger["batches"] == smaller["batches"]
        assert larger["steps"] == smaller["steps"]
        later = slice(len(larger["steps"]) // 2, None)
        values = zip(larger["perplexity"][later], smaller["perplexity"][later], strict=True)
        assert all(large < small for large, small in values)
        assert step is not None
        assert step < smaller["steps"][-1]


def _check_pretrain_gpt2(results: dict[str, Any]) -> None:
    """Both degrees learn the same up to rounding, which dropout's masks and the optimizer carry on."""
    one, two = results["runs"]
    assert one["steps"] == two["steps"]
    assert one["loss"] == pytest.approx(two["loss"], rel=0.01)
    assert one["perplexity"] == pytest.approx(two["perplexity"], rel=0.01)
    assert one["perplexity"][-1] < one["perplexity"][0] / 2


def _check_training_step(results: dict[str, Any]) -> None:
    """A step takes less time than every peer's, and no more memory with a vocabulary four times as large."""
    ratios = {target.work: ratio.median for target, ratio, _ in reached(results) if "our TP=1" not in target.work}
    assert len(ratios) >= 10
    assert max(ratios.values()) < 1, ratios
    small, large = (results[name]["configurations"]["ours-tp2-1t"] for name in ("gpt2-fp32", "gpt2-fp32-200k"))
    first, other = (
        [
            taken["peak"]["resident"] - hello["resident"] - 2 * taken["weights"]
            for hello, taken in zip(seen["hello"], seen["memory"][0], strict=True)
        ]
        for seen in (small, large)
    )
    assert 0 < max(other) < 1.1 * max(first)


_CLAIMS = {
    "finetune_squad": (bench_finetune_squad.main, _check_finetune_squad),
    "layernorm_placement": (bench_layernorm_placement.main, _check_layernorm_placement),
    "model_sizes": (bench_model_sizes.main, _check_model_sizes),
    "pretrain_gpt2": (bench_pretrain_gpt2.main, _check_pretrain_gpt2),
    "training_step": (bench_training_step.main, _check_training_step),
}


@pytest.mark.parametrize("name", _CLAIMS)
def test_committed_results(tmp_path: Path, name: str) -> None:
    """Catches results that do not hold what is claimed of them, and a script that no longer reads them."""
    main, check = _CLAIMS[name]
    shutil.copy(RESULTS / f"{name}.json", tmp_path)
    main(["--redraw", "--output", str(tmp_path)])
    image = (tmp_path / f"{name}.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    check(read(RESULTS / f"{name}.json"))


def test_the_evaluation_is_three_times_faster_than_the_loop() -> None:
    """Catches figures of a setting other than the one that is promised, or that do not keep the promise."""
    report = read(RESULTS / "wikitext103.json")
    setting = report["setting"]
    assert (setting["hidden"], setting["layers"], setting["tokens"]) == (256, 4, 20_000)
    assert report["ratio"] >= 3


def test_the_gradients_of_the_loss_are_as_exact_as_stocks() -> None:
    """Catches a committed table that does not hold what benchmarks/README.md says of it."""
    results = read(RESULTS / "loss_gradient.json")
    ratios = [row["ratio"] for row in results["rows"]]
    assert len(ratios) == 192
    assert max(ratios) <= 1.02
    assert min(row["ratio"] for row in results["rows"] if row["dtype"] == "float16") < 0.4
    assert {row["loss"] for row in results["rows"]} >= {10.0, 1e-5}
    assert all(results["finite at loss scale"].values())


@pytest.mark.slow
def test_the_gradients_of_the_loss_are_measured(tmp_path: Path) -> None:
    """Catches a benchmark that no longer runs."""
    bench_loss_gradient.main(["--quick", "--output", str(tmp_path)])
    assert max(row["ratio"] for row in read(tmp_path / "loss_gradient.json")["rows"]) < 1.1


def test_comparing_ranks_costs_next_to_nothing() -> None:
    """Catches a committed figure that does not hold what benchmarks/README.md says of it."""
    results = read(RESULTS / "rank_checks.json")
    assert results["sizes"]["n_embd"] == 1024
    assert results["share_of_a_step"] < 0.001


@pytest.mark.slow
def test_the_cost_of_comparing_ranks_is_measured(tmp_path: Path) -> None:
    """Catches a benchmark that no longer runs."""
    bench_rank_checks.main(["--quick", "--output", str(tmp_path)])
    assert read(tmp_path / "rank_checks.json")["seconds"]["exchange"] > 0
