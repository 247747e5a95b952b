"""Tables and figure from raw samples."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_training_step import CONFIGURATIONS, planned_bytes
from benchmarks.peers import derived
from benchmarks.peers.competitors import Configuration
from benchmarks.peers.derived import CARD, pairs, ratio_of
from benchmarks.peers.report import draw, markdown
from benchmarks.peers.targets import TARGETS, reached
from benchmarks.peers.workload import GPU_WORKLOADS, WORKLOADS, Workload, training_flops
from benchmarks.records import RESULTS, read

_OURS, _PEER = "ours-tp2-1t", "megatron-core-tp2-1t"


def _configuration(step: float, **peak: int) -> dict[str, Any]:
    """What is measured of one configuration: three rounds, of which the last is disturbed."""
    memory = {"before": 600_000_000, "weights": 100_000_000, "peak": peak}
    sent = {"count": {"allreduce": 3}, "bytes": {"allreduce": 2_500_000}}
    samples = [
        {"step": step * factor, "forward": step / 4, "backward": step / 2, "processor": step, "foreign": foreign}
        for factor, foreign in ((1.0, 0.0), (1.1, 0.1), (9.0, 0.8))
    ]
    return {
        "hello": [{"resident": 400_000_000, "versions": {}}],
        "memory": [[memory, memory]] * 3,
        "communication": [{"forward": sent, "backward": sent}],
        "optimizer": [{"seconds": [0.07, 0.08, 0.09], "kind": "fused"}],
        "samples": samples,
    }


def _result(workload: Workload, configurations: dict[str, Any], device: str = "A processor") -> dict[str, Any]:
    return {
        "workload": asdict(workload),
        "environment": {"device": device, "cores": 2, "versions": {"torch": "2.13.0"}},
        "max_foreign_cores": 0.15,
        "configurations": configurations,
        "failed": {"dtensor-tp2-1t": "RuntimeError: no"},
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """Ours takes 0.8 of the peer's time and half its memory."""
    configurations = {_OURS: _configuration(0.8, resident=900_000_000)}
    configurations[_PEER] = _configuration(1.0, resident=1_800_000_000)
    return {"gpt2-fp32": _result(WORKLOADS["gpt2-fp32"], configurations)}


def test_targets_tell_what_is_met(results: dict[str, Any]) -> None:
    """Catches a ratio upside down, a disturbed round that counts, and a target of what was not measured."""
    rows = {target.work: (ratio.median, ratio.count, is_met) for target, ratio, is_met in reached(results)}
    assert rows == {
        "GPT-2 fp32 TP=2 to megatron-core": (pytest.approx(0.8), 2, True),
        "GPT-2 fp32 TP=2, peak memory, to megatron-core": (0.5, 1, True),
    }
    results["gpt2-fp32"]["configurations"][_OURS] = _configuration(1.2, resident=1_800_000_000)
    assert [is_met for _, _, is_met in reached(results)] == [False, False]


def test_targets_name_what_exists() -> None:
    """Catches a target that is never looked at because its workload or a configuration is misspelled."""
    measured = " ".join(CONFIGURATIONS.values()).split()
    for target in TARGETS:
        assert target.workload in {**WORKLOADS, **GPU_WORKLOADS}
        assert target.ours in measured
        assert target.peer in (*measured, CARD)


def test_tables_and_figure(results: dict[str, Any], tmp_path: Path) -> None:
    """Catches a column that is empty, in other units than its head says, or under another head; a figure not drawn."""
    lines = markdown(results).splitlines()
    row = next(line for line in lines if line.startswith(f"| {_OURS} |"))
    times = "840 | 820 to 860 | 200 | 400 | 800 | 80 | 305"
    assert row == f"| {_OURS} | {times} | 900 | 400 | 300 | 3 + 3 | 2.5 + 2.5 | 2 of 3 |"
    assert f"| {_OURS} / {_PEER} | 0.800 | 0.800 to 0.800 | 2 | 0.500 |" in lines
    assert "dtensor-tp2-1t did not run: RuntimeError: no" in lines
    draw({**results, "again": results["gpt2-fp32"]}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_card_has_a_utilisation(results: dict[str, Any]) -> None:
    """Catches an MFU of other operations than the model's, or of a card whose peak nobody knows."""
    workload = GPU_WORKLOADS["gpt2-1.2b"]
    name = "ours-compiled-tp1-1t"
    configuration = _configuration(training_flops(workload) / 400e12, resident=10**9, allocated=10**9)
    configuration["planned_bytes"] = 2 * 10**9
    result = _result(workload, {name: configuration}, "NVIDIA H100 80GB HBM3")
    floor = ratio_of(result, name, CARD)
    assert floor is not None
    assert floor.low == pytest.approx(989 / 400 * 1.025)
    assert "| 1000 | 2000 | 38.5% | 800 |" in markdown({"gpt2-1.2b": result})
    assert ratio_of({**result, "environment": {"device": "A card"}}, name, CARD) is None


def test_pairs_are_worth_comparing() -> None:
    """Catches a peer in another layout, peers compared with each other, and ours left out."""
    names = ["ours-tp2-1t", "ours-tp1-2t", "ours-compiled-tp1-2t", "dtensor-tp2-1t", "stock-sdpa-tp1-2t"]
    assert list(pairs(names)) == [
        ("ours-tp2-1t", "ours-tp1-2t"),
        ("ours-tp2-1t", "dtensor-tp2-1t"),
        ("ours-tp1-2t", "stock-sdpa-tp1-2t"),
        ("ours-compiled-tp1-2t", "ours-tp1-2t"),
        ("ours-compiled-tp1-2t", "stock-sdpa-tp1-2t"),
    ]


def test_no_clean_sample_is_no_number(results: dict[str, Any]) -> None:
    """Catches a table that crashes, or shows disturbed times, when the machine was never quiet."""
    result = {**results["gpt2-fp32"], "max_foreign_cores": -1.0}
    assert f"| {_OURS} |  |  |  |  |  | 80 |  | 900 | 400 | 300 |" in markdown({"gpt2-fp32": result})
    assert derived.spread_of(result, _OURS) is None


def test_tables_that_are_kept_are_those_of_the_data() -> None:
    """Catches tables edited by hand, or left behind when the data or what is computed from it changed."""
    tables = RESULTS / "training_step.md"
    assert not tables.exists() or tables.read_text() == markdown(read(tables.with_suffix(".json")))


def test_planned_memory() -> None:
    """Catches a planner asked about another step than the one that is measured."""
    workload = replace(GPU_WORKLOADS["gpt2-355m"], batch=2)
    plain, recomputed, cut = (
        planned_bytes(workload, Configuration(name, ranks))
        for name, ranks in (("ours", 1), ("ours-recomputed", 1), ("ours", 2))
    )
    weights = 2 * 24 * 12 * 1024**2  # bytes, of the layers alone
    assert 2 * weights < recomputed < plain
    assert cut < plain
