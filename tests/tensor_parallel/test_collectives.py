"""Beginning a collective, and waiting for it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_megatron.tensor_parallel.collectives import start_all_gather_single, start_all_reduce
from hf_megatron.tensor_parallel.group import SINGLE
from tests.tensor_parallel.ranks import Pool, group


def _wait_for_a_late_rank() -> tuple[torch.Tensor, torch.Tensor]:
    tp = group()
    total, shard = torch.full((3,), float(tp.rank)), torch.full((2,), float(tp.rank))
    gathered = torch.empty(2 * tp.size)
    if tp.rank == 0:
        time.sleep(0.1)
    waits = [start_all_reduce(tp, total), start_all_gather_single(tp, gathered, shard, is_async=False)]
    for wait in waits:
        wait()
    return total, gathered


def test_a_late_rank_is_waited_for(pool: Pool) -> None:
    """Catches a tensor that is handed out unfinished."""
    for total, gathered in pool(2).run(_wait_for_a_late_rank):
        assert total.tolist() == [1.0] * 3
        assert gathered.tolist() == [0.0, 0.0, 1.0, 1.0]


class _Work:
    """A collective's handle."""

    def __init__(self, error: str | None = None) -> None:
        self.error, self.waits = error, 0

    def wait(self) -> None:
        self.waits += 1
        if self.error is not None:
            raise RuntimeError(self.error)


def _start(monkeypatch: pytest.MonkeyPatch, work: _Work, is_async: bool) -> tuple[Any, dict[str, Any]]:
    given: dict[str, Any] = {}

    def all_reduce(tensor: torch.Tensor, **options: Any) -> _Work | None:
        given.update(options)
        return work if options["async_op"] else None

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return start_all_reduce(SINGLE, torch.empty(1, device="meta"), is_async=is_async), given


def test_a_collective_that_fails_is_not_taken_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error of the network that goes unnoticed."""
    wait, _ = _start(monkeypatch, _Work(error="connection closed"), is_async=True)
    with pytest.raises(RuntimeError, match="connection closed"):
        wait()


@pytest.mark.parametrize("is_async", [False, True])
def test_only_what_overlaps_is_asynchronous(monkeypatch: pytest.MonkeyPatch, is_async: bool) -> None:
    """Catches a GPU whose queue is drained after every collective, and one that is given events it does not need."""
    work = _Work()
    wait, given = _start(monkeypatch, work, is_async)
    wait()
    assert work.waits == given["async_op"] == is_async
