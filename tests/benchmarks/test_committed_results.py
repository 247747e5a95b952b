"""What the documents claim of committed results, and that these can be drawn again."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_model_sizes, bench_training_step, profile_training_step, readme_table
from benchmarks.peers.derived import CARD
from benchmarks.peers.report import markdown
from benchmarks.peers.targets import TARGETS, reached
from benchmarks.peers.workload import GPU_WORKLOADS, WORKLOADS
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
        max(
            taken["peak"]["resident"] - hello["resident"] - 2 * taken["weights"]
            for hello, taken in zip(seen["hello"], seen["memory"][0], strict=True)
        )
        for seen in (small, large)
    )
    assert 0 < other < 1.1 * first


def _check_wikitext103(report: dict[str, Any]) -> None:
    """Windows are evaluated three times faster than by the usual loop, in the setting that is promised."""
    setting = report["setting"]
    assert (setting["hidden"], setting["layers"], setting["tokens"]) == (256, 4, 20_000)
    assert report["ratio"] >= 3


def _check_loss_gradient(results: dict[str, Any]) -> None:
    """The gradients of the loss are as exact as stock's, at every scale, and more so in float16."""
    ratios = [row["ratio"] for row in results["rows"]]
    assert (len(ratios), max(ratios) <= 1.02) == (192, True)
    assert min(row["ratio"] for row in results["rows"] if row["dtype"] == "float16") < 0.4
    assert {row["loss"] for row in results["rows"]} >= {10.0, 1e-5}
    assert all(results["finite at loss scale"].values())


def _check_rank_checks(results: dict[str, Any]) -> None:
    """Comparing ranks costs next to nothing."""
    assert results["sizes"]["n_embd"] == 1024
    assert results["share_of_a_step"] < 0.001


def _check_host_time(results: dict[str, Any]) -> None:
    """DTensors cost little host time, and a rank launches no more kernels than stock or megatron-core's local layer."""
    ratios = {what: seconds["dtensor"] / seconds["plain"] for what, seconds in results["times"].items()}
    assert all(ratio < bound for ratio, bound in zip(ratios.values(), (1.3, 1.5, 2.0), strict=True)), ratios
    for size, peer in ((1, "transformers"), (1, "megatron-core, TP=1"), (2, "megatron-core, TP=2")):
        ours, theirs = (results["kernels"][who] for who in (f"ours, TP={size}", peer))
        assert all(sum(ours[name].values()) <= sum(theirs[name].values()) for name in ("forward", "backward"))
        compiled = results["kernels"][f"ours, TP={size}, compiled"]
        counts = [sum(compiled[name].values()) for name in ("forward", "backward")]
        assert all(count <= most for count, most in zip(counts, {1: (15, 19), 2: (19, 21)}[size], strict=True))


def _check_data(results: dict[str, Any]) -> None:
    """Of 2 billion tokens the first batch comes within a second and 50 MB, and more 20 times as fast as is trained."""
    assert (results["tokens"], len(results["ranks"])) == (2_000_000_000, 2)
    assert max(rank["open_seconds"] + rank["first_batch_seconds"] for rank in results["ranks"]) < 1
    assert max(rank["private_bytes"] for rank in results["ranks"]) < 50e6
    assert results["times_the_example"] > 20


def _check_background_saving(results: dict[str, Any]) -> None:
    """Training stops for less than a tenth of the time."""
    assert results["sizes"]["n_embd"] == 768
    assert results["share_of_a_blocking_stall"] < 0.1


_CLAIMS = [name.removeprefix("_check_") for name in globals() if name.startswith("_check_")]
_DRAWN = ("finetune_squad", "layernorm_placement", "model_sizes", "pretrain_gpt2", "training_step")


@pytest.mark.parametrize("name", _CLAIMS)
def test_committed_results(tmp_path: Path, name: str) -> None:
    """Catches results that do not hold what is claimed of them, and a script that no longer reads them."""
    globals()[f"_check_{name}"](read(RESULTS / f"{name}.json"))
    if name in _DRAWN:
        shutil.copy(RESULTS / f"{name}.json", tmp_path)
        import_module(f"benchmarks.bench_{name}").main(["--redraw", "--output", str(tmp_path)])
        image = (tmp_path / f"{name}.png").read_bytes()
        assert (image[:4], len(image) > 10_000) == (b"\x89PNG", True)


def test_the_documents_have_what_was_measured() -> None:
    """Catches a README, a docs/performance.md or a table of results with other figures than the committed ones."""
    training, conversions = read(RESULTS / "training_step.json"), read(RESULTS / "conversion.json")
    assert (RESULTS / "training_step.md").read_text() == markdown(training)
    table = readme_table.block(training, read(RESULTS / "decoding.json"))
    assert table in readme_table.README.read_text(encoding="utf-8")
    profile = profile_training_step.markdown(read(RESULTS / "profile.json"))
    performance = (readme_table.README.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert profile in performance
    host = (RESULTS / "host_time.md").read_text()
    assert host in performance
    readme = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert host in readme
    names = {"gpt2-355m": "GPT-2", "gpt2-2.5b": "GPT-2 2.5B", "bert-336m": "BERT"}
    rows = [(name, row) for model, name in names.items() for row in conversions[model]["directions"]]
    assert len(rows) == 23
    for name, row in rows:
        tools = row["copy_cpu_seconds"] + row["sha256sum_cpu_seconds"]
        speed = row["bytes_per_cpu_second_without_checksums"]
        to = row["to"].removesuffix(" in files of 2 GB")
        assert (
            f"| {name} | {row['from']} | {to} | {row['cpu_seconds']:.1f} | {tools:.1f} | {row['cpu_ratio']:.2f} | "
            f"{speed / 1e6:.0f} | {row['peak_rss_bytes'] / 1e6:.0f} |\n"
        ) in readme


def test_targets_name_what_is_measured() -> None:
    """Catches a target that is never looked at because its workload or a configuration is misspelled."""
    measured = " ".join(bench_training_step.CONFIGURATIONS.values()).split()
    for target in TARGETS:
        assert target.workload in {**WORKLOADS, **GPU_WORKLOADS}
        assert target.ours in measured
        assert target.peer in (*measured, CARD)
