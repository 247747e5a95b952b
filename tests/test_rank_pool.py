"""The rank pool itself: every other distributed test relies on what it reports."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import initialize_distributed_mesh

from tests import distributed
from tests.distributed import RankFailedError, RankHungError
from tests.models.reference import Pool


def _sum_over_ranks(addend: torch.Tensor, *, factor: float) -> torch.Tensor:
    total = addend * (dist.get_rank() + 1) * factor
    dist.all_reduce(total)
    return total


def _go_wrong_on_last_rank(how: str) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(600 if how == "sleep" else 0.2)  # the others are inside the collective by then
        if how == "raise":
            raise ValueError("the root cause")
        os.kill(os.getpid(), signal.Signals[how])
    dist.all_reduce(torch.zeros(1))


def _fail_on_rank_0_and_spin_on_rank_1() -> None:
    if dist.get_rank() == 0:
        raise ValueError("the root cause")
    while True:
        pass


def _call_different_collectives() -> None:
    dist.recv(torch.zeros(1), src=1 - dist.get_rank())


def _litter() -> None:
    os.environ["LITTER"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(dist.get_rank() + 17)


def _surroundings() -> tuple[str | None, torch.dtype, float]:
    return os.environ.get("LITTER"), torch.get_default_dtype(), torch.rand(()).item()


def _make_groups(count: int) -> int:
    for _ in range(count):
        dist.new_group()
    return os.getpid()


def _count_groups_of_models(models: int) -> int:
    for _ in range(models):
        initialize_distributed_mesh(DistributedConfig(tp_size=dist.get_world_size()))
    return len(distributed_c10d._world.pg_map)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_back_by_rank_and_as_plain_tensors(pool: Pool, world_size: int) -> None:
    """Catches a world of the wrong size, lost arguments, and results in shared memory that dies with the rank."""
    results = pool(world_size).run(_sum_over_ranks, torch.ones(3), factor=0.5)
    expected = 0.5 * sum(range(1, world_size + 1))
    assert [result.tolist() for result in results] == [[expected] * 3] * world_size
    assert not any(result.is_shared() for result in results)


def test_ranks_stay_alive_between_jobs(pool: Pool) -> None:
    """Catches ranks that are started anew for every job, which would cost seconds per test."""
    first = pool(2).run(os.getpid)
    assert len({*first, os.getpid()}) == 3
    assert pool(2).run(os.getpid) == first


def test_the_failing_rank_comes_before_its_peers(pool: Pool) -> None:
    """Catches a report headed by a peer's "connection closed", and a pool that keeps the broken world."""
    ranks_before = pool(2).run(os.getpid)
    with pytest.raises(RankFailedError) as caught:
        pool(2).run(_go_wrong_on_last_rank, "raise")

    assert caught.value.rank == 1
    message = str(caught.value)
    assert message.startswith("rank 1 failed first in tests.test_rank_pool._go_wrong_on_last_rank")
    root, peer = message.index("\nrank 1: Traceback"), message.index("\nrank 0: Traceback")
    assert root < message.index("ValueError: the root cause") < peer
    assert not set(ranks_before) & set(pool(2).run(os.getpid))


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ("SIGKILL", r"^rank 1 failed first .*\nrank 1: the process died with exit code -9"),
        ("SIGSEGV", r"exit code -11\n(.*\n)+.* in _go_wrong_on_last_rank\n"),
    ],
)
def test_a_killed_rank_is_named(pool: Pool, sent: str, told: str) -> None:
    """Catches a silent death (out of memory) blamed on peers or waited for, and a crash in C++ that says not where."""
    with pytest.raises(RankFailedError, match=told):
        pool(2).run(_go_wrong_on_last_rank, sent)


def test_a_hang_names_the_rank_and_the_line(pool: Pool) -> None:
    """Catches a hang that stalls the whole run, or is blamed on the rank that only waits in a collective."""
    pool(2).run(os.getpid)
    with pytest.raises(RankHungError) as caught:
        pool(2).run(_go_wrong_on_last_rank, "sleep", timeout=2)

    assert caught.value.rank == 1
    message = str(caught.value)
    assert message.startswith("rank 1 hung in tests.test_rank_pool._go_wrong_on_last_rank after 2 s")
    own, peer = message.split("\nrank 0 was at\n")
    assert "in _go_wrong_on_last_rank" in own
    assert "in all_reduce" in peer


@pytest.mark.timeout(100)
def test_a_failure_does_not_wait_for_the_other_ranks(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failure that is reported only after the whole timeout because another rank is still busy."""
    monkeypatch.setattr(distributed, "_GRACE", 0.5)
    with pytest.raises(RankFailedError, match=r"^rank 0 failed first") as caught:
        pool(2).run(_fail_on_rank_0_and_spin_on_rank_1, timeout=1000)
    _, _, straggler = str(caught.value).partition("\nrank 1 did not stop within 0.5 s; it was at\n")
    assert "in _fail_on_rank_0_and_spin_on_rank_1" in straggler


def test_a_hang_without_a_culprit_says_so(pool: Pool) -> None:
    """Catches a deadlock of mismatched communication that is pinned on one arbitrary rank."""
    with pytest.raises(RankHungError, match=r"^ranks 0, 1 hung in .* each inside a collective"):
        pool(2).run(_call_different_collectives, timeout=2)


def test_a_result_that_cannot_travel_is_a_failure(pool: Pool) -> None:
    """Catches a rank that dies, or never answers, because its result does not pickle."""
    with pytest.raises(RankFailedError, match=r"cannot pickle '_thread\.lock'"):
        pool(1).run(threading.Lock)


def test_jobs_start_from_the_same_state(pool: Pool) -> None:
    """Catches tests that pass or fail by their order: left-over environment, default dtype, random state."""
    clean = pool(2).run(_surroundings)
    pool(2).run(_litter)
    assert pool(2).run(_surroundings) == clean
    assert clean[0] == clean[1] == (None, torch.float32, clean[0][2])


def test_ranks_with_too_many_groups_are_replaced(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches process groups that pile up over a session until threads or file descriptors run out."""
    monkeypatch.setattr(distributed, "_MAX_GROUPS", 5)
    littered = pool(2).run(_make_groups, 5)
    assert not set(littered) & set(pool(2).run(os.getpid))


def test_models_of_one_layout_share_their_groups(pool: Pool) -> None:
    """Catches process groups for every model that a rank loads, each with a thread that takes time from all tests."""
    assert len(set(pool(2).run(_count_groups_of_models, 1) + pool(2).run(_count_groups_of_models, 5))) == 1
