"""Beginning a collective, and waiting for it; what ranks ask of each other beside the facts that training compares."""

import threading
import time
from typing import Any, Self
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hf_megatron.tensor_parallel import cpu
from hf_megatron.tensor_parallel.agreement import RankComparison
from hf_megatron.tensor_parallel.collectives import start_all_gather, start_all_reduce
from hf_megatron.tensor_parallel.group import SINGLE
from tests.live import on_live_ranks
from tests.tensor_parallel.ranks import group


@pytest.mark.parametrize("polling_seconds", [0.0, 0.01, 10.0])
@on_live_ranks(2)
def test_a_late_rank_is_waited_for(polling_seconds: float) -> None:
    """Catches a tensor that is handed out unfinished when the time for asking is over, and asking that never ends."""
    tp = group()
    total, shard = torch.full((3,), float(tp.rank)), torch.full((2,), float(tp.rank))
    if tp.rank == 0:
        time.sleep(0.1)
    with patch.multiple(cpu, POLLING_SECONDS=polling_seconds, _CORES=2):
        wait, gather = start_all_reduce(tp, total), start_all_gather(tp, shard, 0, 2 * tp.size, is_async=False)
        wait()
        assert total.tolist() == [1.0] * 3
        assert gather().tolist() == [0.0, 0.0, 1.0, 1.0]


@on_live_ranks(2)
def test_every_rank_is_heard() -> None:
    """Catches wishes of which only one rank's counts: who asks for a checkpoint may be any of them."""
    assert dist.group.WORLD is not None
    assert RankComparison.on_cpu(dist.group.WORLD).agree("here", {}, 1 << dist.get_rank()) == 0b11


class _Work:
    """A collective's handle; it is done when it has been asked a few times."""

    def __init__(self, answers: list[bool], error: str | None = None) -> None:
        self.answers, self.error, self.waits = answers, error, 0

    def get_future(self) -> Self:
        return self

    def done(self) -> bool:
        return self.answers.pop(0)

    def wait(self) -> None:
        self.waits += 1
        if self.error is not None:
            raise RuntimeError(self.error)


def _start(
    monkeypatch: pytest.MonkeyPatch, work: _Work, device: str, is_async: bool = True, held: list[Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    given: dict[str, Any] = {}

    def all_reduce(tensor: torch.Tensor, **options: Any) -> _Work | None:
        given.update(options)
        if held is not None:
            held.append(tensor.view(-1))  # a view holds its base as gloo's thread would: not as a Python object
        return work if options["async_op"] else None

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return start_all_reduce(SINGLE, torch.empty(1, device=device), is_async=is_async), given


def test_ranks_that_outnumber_the_cores_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that ask all the time and so keep those they wait for from computing."""
    monkeypatch.setattr(cpu, "_CORES", 2)
    monkeypatch.setattr(cpu, "POLLING_SECONDS", 60.0)
    for local_world_size, questions in (("2", 3), ("3", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
        work = _Work([False, False, True])
        wait, _ = _start(monkeypatch, work, "cpu")
        wait()
        assert 3 - len(work.answers) == questions
        assert work.waits == 1


def test_a_wait_ends_when_the_tensors_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a thread of gloo's that is the last to hold a tensor: where a process ends then, it crashes."""
    held: list[Any] = []
    wait, _ = _start(monkeypatch, _Work([True]), "cpu", held=held)
    assert len(held) == 1
    threading.Timer(0.1, held.clear).start()
    wait()
    assert not held


@pytest.mark.timeout(30)
def test_a_tensor_that_is_never_let_go_is_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a hang where a profiler, say, keeps what a collective was called with."""
    monkeypatch.setattr(cpu, "RELEASE_SECONDS", 0.01)
    wait, _ = _start(monkeypatch, _Work([True]), "cpu", held=[])
    wait()


def test_a_collective_that_fails_is_not_taken_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error of the network that goes unnoticed, as failed work counts as completed."""
    wait, _ = _start(monkeypatch, _Work([False, False, True], error="connection closed"), "cpu")
    with pytest.raises(RuntimeError, match="connection closed"):
        wait()


@pytest.mark.parametrize("is_async", [False, True])
def test_only_a_cpu_is_asked(monkeypatch: pytest.MonkeyPatch, is_async: bool) -> None:
    """Catches a GPU whose queue is drained after every collective, and one that is given events it does not need."""
    work = _Work([])
    wait, given = _start(monkeypatch, work, "meta", is_async)
    wait()
    assert work.waits == given["async_op"] == is_async
