"""What a comparison with peers rests on: all of them compute the same, and nothing else disturbs them."""

from itertools import repeat
from math import nan
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch.distributed as dist

from benchmarks import bench_decoding
from benchmarks.peers import rounds
from benchmarks.peers.agreement import DifferentWorkError, check_same_work
from benchmarks.peers.competitors import Configuration
from benchmarks.peers.worker import Job, Worker
from benchmarks.peers.workload import TINY_WORKLOADS, generate
from tests.models.reference import Pool

_ALONE = {"gpt2": ("ours", "ours-recomputed", "stock-sdpa", "stock-eager", "dtensor"), "bert": ("ours", "stock-eager")}
_TOGETHER = {"gpt2": ("ours", "dtensor"), "bert": ("ours", "transformers-tp")}


def _check(competitors: tuple[str, ...], model: str, directory: str) -> dict[str, dict[str, Any]]:
    """What this rank answers to `check`, and what a step sends."""
    replies = {}
    for competitor in competitors:
        configuration = Configuration(competitor, dist.get_world_size())
        worker = Worker(Job(configuration, TINY_WORKLOADS[f"{model}-tiny"], directory), dist.get_rank(), "")
        worker.load()
        replies[configuration.name] = {"check": worker.check(), "sent": worker.communication()}
    return replies


@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_competitors_compute_the_same(model: str, pool: Pool, tmp_path: Path) -> None:
    """Catches weights read into the wrong place, a loss over other positions, and a plan that makes a peer slow."""
    directory = str(generate(TINY_WORKLOADS[f"{model}-tiny"], tmp_path / "checkpoint"))
    worlds = (
        pool(1).run(_check, _ALONE[model], model, directory),
        pool(2).run(_check, _TOGETHER[model], model, directory),
    )
    found = {name: {"check": [ranks[name]["check"] for ranks in world]} for world in worlds for name in world[0]}
    assert len(found) == len(_ALONE[model]) + len(_TOGETHER[model])
    check_same_work(found, "float32")
    if model == "gpt2":
        sent = worlds[1][0]["dtensor-tp2-1t"]["sent"]
        # Two layers, twice each; forward the embedding, backward the head: queries, keys and values share theirs.
        for way in ("forward", "backward"):
            assert sum(count for name, count in sent[way]["count"].items() if "all" in name and "reduce" in name) == 5


@pytest.mark.parametrize("figures", [{}, {"loss": 10.01}, {"gradient_norm": 2.01}, {"loss": nan}])
def test_other_work_is_refused(figures: dict[str, float]) -> None:
    """Catches a peer that lost a bias, or whose backward pass is wrong, or a rank that nobody looked at."""
    right = {"loss": 10.0, "gradient_norm": 2.0}
    other = {"loss": 10.0001, "gradient_norm": 2.0005, **figures}  # what rounding explains is the same
    found = {"ours-tp1-1t": {"check": [right]}, "dtensor-tp2-1t": {"check": [right, other]}}
    if not figures:
        check_same_work(found, "float32")
        return
    with pytest.raises(DifferentWorkError, match=r"of dtensor-tp2-1t, rank 1, is .* that of ours-tp1-1t"):
        check_same_work(found, "float32")


def test_other_tokens_are_refused() -> None:
    """Catches a fast decoder that decodes something else; models of different kinds are not compared."""
    same = {"gpt2 a": [[[1, 2]], [[1, 2]]], "gpt2 b": [[[1, 2]]], "llama a": [[[3, 4]]]}
    bench_decoding.check_same_tokens(same)
    with pytest.raises(DifferentWorkError, match="gpt2 b and gpt2 a"):
        bench_decoding.check_same_tokens({**same, "gpt2 b": [[[1, 3]]]})


@pytest.mark.parametrize("is_quiet_later", [True, False])
def test_a_disturbed_sample_does_not_count(is_quiet_later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a disturbed sample kept for a clean one, an endless loop on a busy machine, and rank 0's time alone."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(rounds, "_QUIET_SECONDS", 0.0)
    workers = MagicMock(**{"waited_seconds.return_value": 0.0, "ask.return_value": [{"step": 1.0}, {"step": 3.0}]})
    workers.foreign_load().cores.side_effect = [0.9, *repeat(0.1, 20)] if is_quiet_later else repeat(0.9)
    taken = rounds.sample(workers, "step")
    assert taken["step"] == 3.0
    assert workers.ask.call_count == (2 if is_quiet_later else rounds.ATTEMPTS)
    assert len(rounds.clean([taken])) == is_quiet_later
