"""Processes that wait for commands."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.peers import machine
from benchmarks.peers.competitors import Configuration
from benchmarks.peers.fleet import WorkerError, Workers
from benchmarks.peers.worker import Job
from benchmarks.peers.workload import Workload, generate

_WORKLOAD = Workload("gpt2", 2, 64, 4, vocab=512, sequence=32)


@pytest.mark.slow
def test_two_ranks_obey(tmp_path: Path) -> None:
    """Catches a command that does not answer, and figures that are nonsense."""
    job = Job(Configuration("ours", 2), _WORKLOAD, str(generate(_WORKLOAD, tmp_path / "checkpoint")))
    with Workers(job, tmp_path) as workers:
        assert all("torch" in hello["versions"] and hello["resident"] > 2**26 for hello in workers.hello())
        for loaded in workers.ask("load"):
            assert loaded["seconds"] > 0
            assert loaded["peak"]["resident"] >= loaded["before"]
        assert len({reply["loss"] for reply in workers.ask("check")}) == 1
        for step in workers.ask("step"):
            assert step["step"] == pytest.approx(step["forward"] + step["backward"])
            assert 0 < step["processor"] < 60
        for memory in workers.ask("memory"):
            assert memory["peak"]["resident"] >= memory["before"] > memory["weights"] > 0
        forward = workers.ask("communication")[0]["forward"]
        assert forward["bytes"]["allreduce"] >= 5 * 32 * 64 * 4  # the embedding, and two for each of two layers
        assert all(len(reply["seconds"]) == 5 and reply["kind"] == "fused" for reply in workers.ask("optimizer"))
        assert any("mm" in row["operator"] for row in workers.ask("profile 40")[0]["operators"])
        decoded = [reply["tokens"] for reply in workers.ask("generate 3")]
        assert [len(tokens) for tokens in decoded[0]] == [3]
        assert decoded[0] == decoded[1]
        workers.ask("unload")


@pytest.mark.slow
def test_a_worker_that_dies_is_told_of(tmp_path: Path) -> None:
    """Catches an error that does not reach the script, and a script that waits forever for a killed worker."""
    with Workers(Job(Configuration("stock-sdpa"), _WORKLOAD, str(tmp_path)), tmp_path) as workers:
        workers.hello()
        with pytest.raises(WorkerError, match="the command for it is `load`"):
            workers.ask("check")
        os.kill(workers.processes[0].pid, signal.SIGKILL)
        (tmp_path / "stock-sdpa-tp1-1t-0.log").write_text("out of something")
        with pytest.raises(WorkerError, match="gave no answer to 'load'; it last printed\nout of something"):
            workers.ask("load")


def test_own_work_is_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a load that counts the measured processes themselves, which would drop every sample."""
    busy, own = iter([100.0, 115.0]), iter([3.0, 8.0])
    monkeypatch.setattr(machine, "time", SimpleNamespace(monotonic=iter([0.0, 10.0]).__next__))
    monkeypatch.setattr(machine, "_busy_seconds", busy.__next__)
    assert machine.ForeignLoad(own.__next__).cores() == 1.0
    monkeypatch.undo()
    assert machine.processor_seconds_of(os.getpid()) == pytest.approx(sum(os.times()[:2]), abs=0.5)
    assert machine._busy_seconds() > machine.processor_seconds_of(os.getpid())
