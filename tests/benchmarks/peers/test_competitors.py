"""Every competitor that needs nothing but our environment computes the same, at TP=1 and TP=2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.peers.agreement import check_same_work
from benchmarks.peers.competitors import COMPETITORS, Configuration
from benchmarks.peers.meters import Collectives
from benchmarks.peers.worker import Job, Worker
from benchmarks.peers.workload import TINY_WORKLOADS, generate
from tests.distributed import RankPool
from tests.repository import ROOT

_TWO_RANKS = {"gpt2": ("ours", "dtensor"), "bert": ("ours", "transformers-tp")}
_ONE_RANK = {
    "gpt2": ("ours", "ours-recomputed", "stock-sdpa", "stock-eager", "dtensor"),
    "bert": ("ours", "stock-eager"),
}


def _check(competitors: tuple[str, ...], model: str, directory: str) -> dict[str, dict[str, Any]]:
    """What this rank answers to `check`, and what a step sends."""
    replies = {}
    for competitor in competitors:
        configuration = Configuration(competitor, dist.get_world_size())
        worker = Worker(Job(configuration, TINY_WORKLOADS[f"{model}-tiny"], directory), dist.get_rank(), "")
        worker.load()
        replies[configuration.name] = {"check": worker.check(), "sent": worker.communication()}
    return replies


def _all_reduces(reply: dict[str, Any]) -> list[int]:
    return [
        sum(number for name, number in reply["sent"][way]["count"].items() if "all" in name and "reduce" in name)
        for way in ("forward", "backward")
    ]


@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_competitors_compute_the_same(model: str, pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    """Catches weights that a competitor reads into the wrong place, a loss over other positions, a wrong plan."""
    directory = str(generate(TINY_WORKLOADS[f"{model}-tiny"], tmp_path / "checkpoint"))
    alone = pool(1).run(_check, _ONE_RANK[model], model, directory)
    together = pool(2).run(_check, _TWO_RANKS[model], model, directory)
    found = {
        name: {"check": [ranks[name]["check"] for ranks in world]} for world in (alone, together) for name in world[0]
    }
    assert len(found) == len(_ONE_RANK[model]) + len(_TWO_RANKS[model])
    check_same_work(found, "float32")


def test_dtensor_is_cut_as_well_as_it_can_be(pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    """Catches a plan under which query, key and value each all-reduce their input's gradient: a peer made slow."""
    directory = str(generate(TINY_WORKLOADS["gpt2-tiny"], tmp_path / "checkpoint"))
    replies = pool(2).run(_check, ("dtensor",), "gpt2", directory)[0]["dtensor-tp2-1t"]
    # Two layers, twice each; forward the embedding, backward the head. What loss_parallel sends is too small to see.
    assert _all_reduces(replies) == [5, 5]


def _two_collectives() -> tuple[dict[str, int], dict[str, int]]:
    with Collectives() as seen:
        dist.all_reduce(torch.ones(10))
        gathered = torch.empty(6, dtype=torch.float64)
        dist.all_gather_into_tensor(gathered, torch.ones(3, dtype=torch.float64))
        dist.barrier()
    return dict(seen.count), dict(seen.bytes)


def test_collectives_are_counted_by_what_goes_in(pool: Callable[[int], RankPool]) -> None:
    """Catches an all-gather counted by its result, which grows with the ranks, and a barrier counted as traffic."""
    assert pool(2).run(_two_collectives)[0] == (
        {"allreduce": 1, "_allgather_base": 1},
        {"allreduce": 40, "_allgather_base": 24},
    )


def test_no_competitor_promises_a_model_that_it_cannot_build() -> None:
    """Catches a competitor in the table whose module does not exist."""
    modules = {file.stem for file in (ROOT / "benchmarks" / "peers").glob("*.py")}
    assert {competitor.module for competitor in COMPETITORS.values()} <= modules
