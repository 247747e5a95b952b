"""Runs whose ranks and nodes are killed end as undisturbed ones do. The nodes are agents of torchrun on this machine.

``HF_MEGATRON_NODE_KILLS=20`` makes it so many.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file

from hf_megatron.training.training_state import verify_checkpoint
from tests.examples.commands import losses, run_here
from tests.examples.test_finetune import _EXAMPLES as FINETUNING
from tests.models.reference import Pool
from tests.repository import ROOT

pytestmark = pytest.mark.slow

_NUM_KILLS = int(os.environ.get("HF_MEGATRON_NODE_KILLS", "3"))
_TINY = ["--learning-rate=5e-3", "--layers=1", "--hidden=32", "--heads=2", "--length=32", "--batch=8"]
_TINY += ["--vocab-size=500", "--save-steps=10"]


def _agent(launcher: list[str], name: str, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start torchrun; an agent that is killed leaves its log, and its ranks, to the next one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *launcher]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if not any(option.startswith("--nnodes") for option in launcher):
        del environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]  # one node works without
    with log.open("ab") as file:
        example = str(ROOT / "examples" / f"{name}.py")
        return subprocess.Popen([*command, example, *arguments], env=environment, stdout=file, stderr=file)


def _nodes_launcher(nodes: str = "2") -> list[str]:
    """Options of each of two agents that are to find each other."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test"]


def _has_rendezvous(launcher: list[str]) -> bool:
    """Whether an agent keeps the rendezvous."""
    [endpoint] = [option for option in launcher if option.startswith("--rdzv-endpoint")]
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", int(endpoint.rpartition(":")[2]))) == 0


def _ranks(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        ranks: list[psutil.Process] = psutil.Process(agent.pid).children()
    except psutil.NoSuchProcess:
        return []
    return ranks


def _steps(output: Path) -> int:
    """The step of the last checkpoint."""
    return max((int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*")), default=0)


def _wait(condition: Any, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_torchrun_restarts_a_run(pool: Pool, tmp_path: Path, text_files: list[str], blow: signal.Signals) -> None:
    """Catches a restart that hangs, begins anew, is refused or takes another tokenizer, and a save by the survivors."""
    output = tmp_path / "run"
    arguments = [*_TINY, "--steps=60", "--ddp-timeout=20", "--text", *text_files]
    options = ["--max-restarts=3", "--shutdown-timeout=5"]
    agent = _agent(options, "pretrain_gpt2", [*arguments, f"--output={output}"], tmp_path / "log")
    try:
        for rank, step in ((1, 10), (0, 30)):
            _wait(lambda step=step: _steps(output) >= step or agent.poll() is not None)
            assert agent.poll() is None, (tmp_path / "log").read_text()
            ranks = _ranks(agent)
            ranks[rank].send_signal(blow)
            _wait(lambda ranks=ranks: not set(ranks) & set(_ranks(agent)))
            assert _steps(output) % 10 == 0, "a rank whose peer was killed has saved"
        assert agent.wait(400) == 0, (tmp_path / "log").read_text()
    finally:
        _end([agent])
    undisturbed = [*arguments, f"--tokenizer={output}", f"--output={tmp_path / 'undisturbed'}"]
    pool(2).run(run_here, "pretrain_gpt2", *undisturbed, timeout=240)
    expected = losses(tmp_path / "undisturbed")
    assert len(expected) == 6
    assert losses(output) == pytest.approx(expected, rel=1e-6)


@pytest.mark.timeout(900)
def test_torchrun_passes_a_schedulers_signal_on(tmp_path: Path, text_files: list[str]) -> None:
    """Catches a run that loses what it has learned since its last checkpoint when its time is up."""
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = [*_TINY, "--save-steps=20000", "--steps=20000", "--text", *text_files, f"--output={output}"]
    options = ["--signals-to-handle=SIGTERM,SIGUSR1", "--shutdown-timeout=120"]
    agent = _agent(options, "pretrain_gpt2", arguments, log)
    try:
        _wait(lambda: agent.poll() is not None or "'loss'" in log.read_text())
        agent.send_signal(signal.SIGUSR1)
        assert agent.wait(200) not in (0, -signal.SIGUSR1), "the scheduler has to see that the run is not over"
    finally:
        _end([agent])
    [checkpoint] = output.glob("checkpoint-*")
    step = _steps(output)
    assert 20 <= step < 20_000
    assert f"A signal has stopped the run after step {step}; a checkpoint is saved." in log.read_text()
    verify_checkpoint(checkpoint)


def _end(agents: list[subprocess.Popen[bytes]]) -> None:
    for agent in agents:
        for rank in _ranks(agent):
            rank.kill()
        agent.kill()
        agent.wait()


@pytest.mark.parametrize("name", ["pretrain_gpt2", "pretrain_bert", *FINETUNING])
@pytest.mark.timeout(900)
def test_two_nodes(pool: Pool, tmp_path: Path, text_files: list[str], tiny_bert: str, name: str) -> None:
    """Catches nodes that look for what rank 0 alone has, and losses that depend on which ranks share a node."""
    if name in FINETUNING:
        arguments = [*FINETUNING[name](tmp_path), f"--model={tiny_bert}", "--epochs=1", "--tp=2"]
    else:
        arguments = [*_TINY, "--steps=20", "--tp=2", "--text", *text_files]
    launcher, output, log = _nodes_launcher(), tmp_path / "nodes", tmp_path / "log"
    agents = [_agent(launcher, name, [*arguments, f"--output={output}"], log) for _ in range(2)]
    try:
        assert [agent.wait(400) for agent in agents] == [0, 0], log.read_text()
    finally:
        _end(agents)
    tokenizer = [] if name in FINETUNING else [f"--tokenizer={output}"]
    pool(4).run(run_here, name, *arguments, *tokenizer, f"--output={tmp_path / 'one'}", timeout=240)
    expected = losses(tmp_path / "one")
    assert expected
    assert losses(output) == pytest.approx(expected, rel=1e-6)


@pytest.mark.timeout(900)
def test_nodes_that_share_no_directory_are_told(tmp_path: Path, text_files: list[str]) -> None:
    """Catches training whose checkpoints are in pieces on several disks."""
    launcher, log = _nodes_launcher(), tmp_path / "log"
    arguments = [*_TINY, "--steps=20", "--tp=2", "--text", *text_files]
    outputs = [f"--output={tmp_path / name}" for name in "ab"]
    agents = [_agent(launcher, "pretrain_gpt2", [*arguments, output], log) for output in outputs]
    try:
        assert [agent.wait(400) for agent in agents] == [1, 1]
    finally:
        _end(agents)
    assert "ranks 2, 3 do not see what rank 0 writes to" in log.read_text()
    assert not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.timeout(900)
def test_a_run_goes_on_without_a_node_and_with_it_again(pool: Pool, tmp_path: Path, text_files: list[str]) -> None:
    """Catches a node that waits for the lost one, or is refused when it comes back, and losses that depend on both."""
    output, logs = tmp_path / "run", [tmp_path / "log 0", tmp_path / "log 1"]
    launcher = [*_nodes_launcher("1:2"), "--rdzv-conf=last_call_timeout=5", "--max-restarts=3"]
    # The degree is the number of ranks: dropout does not depend on it, but on the number of data-parallel ranks.
    arguments = [*_TINY, "--heads=4", "--steps=400", "--text", *text_files]

    def start(node: int) -> subprocess.Popen[bytes]:
        return _agent(launcher, "pretrain_gpt2", [*arguments, "--resume", f"--output={output}"], logs[node])

    agents = [start(0)]
    try:
        _wait(lambda: _has_rendezvous(launcher))  # the first node keeps the rendezvous, and the second one is lost
        agents.append(start(1))
        _wait(lambda: _steps(output) >= 20 or any(agent.poll() is not None for agent in agents))
        ranks = _ranks(agents[1])
        agents[1].kill()
        for rank in ranks:
            rank.kill()
        _wait(lambda: "going on from" in logs[0].read_text() or agents[0].poll() is not None)
        agents[1].wait()
        agents[1] = start(1)
        assert [agent.wait(400) for agent in agents] == [0, 0]
    except AssertionError as error:
        raise AssertionError("".join(log.read_text()[-10_000:] for log in logs)) from error
    finally:
        _end(agents)
    # The ranks of the one node have saved when the other came back, between two logs.
    stopped = set(re.findall(r"A signal has stopped the run after step (\d+)", logs[0].read_text()))
    assert len(stopped) == 1, "the node has not come back in time"
    between = int(stopped.pop()) // 10
    undisturbed = [*arguments, f"--tokenizer={output}", f"--output={tmp_path / 'undisturbed'}"]
    pool(4).run(run_here, "pretrain_gpt2", *undisturbed, timeout=240)
    ours, expected = losses(output), losses(tmp_path / "undisturbed")
    assert len(ours) == len(expected) == 40
    ours[between] = expected[between]
    assert ours == pytest.approx(expected, rel=1e-6)


class _Scheduler:
    """Keeps two agents running until both have succeeded, as Kubernetes and Slurm's --requeue do."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        launcher = [*_nodes_launcher(), "--max-restarts=100", "--shutdown-timeout=5"]
        self._start = lambda: _agent(launcher, "pretrain_gpt2", arguments, log)
        self.agents = [self._start() for _ in range(2)]
        self._hanging: list[psutil.Process] = []

    def end(self) -> None:
        """Kill what is left; a rank that hangs may have outlived its agent."""
        _end(self.agents)
        for rank in self._hanging:
            if rank.is_running():
                rank.kill()

    def tend(self) -> bool:
        """Restart what failed; whether both have ended well."""
        for index, agent in enumerate(self.agents):
            if agent.poll():
                self.agents[index] = self._start()
        return [agent.poll() for agent in self.agents] == [0, 0]

    def kill(self, chance: random.Random) -> None:
        """Kill a rank, an agent whose ranks live on, or a node, or let a rank hang."""
        agent = chance.choice(self.agents)
        ranks = _ranks(agent)
        kind = chance.choice(["rank", "rank", "hang", "agent", "node"])
        if kind in ("rank", "hang") and ranks:
            ranks = [chance.choice(ranks)]
        if kind in ("agent", "node"):
            agent.kill()
        if kind == "hang":
            self._hanging += ranks[:1]
        for rank in ranks if kind != "agent" else []:
            rank.send_signal(signal.SIGSTOP if kind == "hang" else signal.SIGKILL)


@pytest.mark.timeout(300 + 120 * _NUM_KILLS)
def test_nodes_killed_at_random_moments(pool: Pool, tmp_path: Path, text_files: list[str]) -> None:
    """Catches nodes that wait for each other forever, steps done twice or never, and checkpoints of two lives mixed."""
    output, steps = tmp_path / "run", 40 * _NUM_KILLS
    arguments = [*_TINY, f"--steps={steps}", "--tp=2", "--ddp-timeout=20", "--text", *text_files]
    scheduler = _Scheduler([*arguments, "--resume", f"--output={output}"], tmp_path / "log")
    chance = random.Random(0)
    try:
        for number in range(_NUM_KILLS):
            step, end = _steps(output), time.monotonic() + chance.uniform(0, 40)
            # Every other one is killed when it trains; the rest while processes start and find each other, too.
            while time.monotonic() < end if number % 2 else _steps(output) < min(step + 10, steps):
                scheduler.tend()
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 2))
            scheduler.kill(chance)
        _wait(scheduler.tend, 240 + 60 * _NUM_KILLS)
    except AssertionError as error:
        raise AssertionError((tmp_path / "log").read_text()[-20_000:]) from error
    finally:
        scheduler.end()
    undisturbed = [*arguments, f"--tokenizer={output}", f"--output={tmp_path / 'undisturbed'}"]
    pool(4).run(run_here, "pretrain_gpt2", *undisturbed, timeout=600)
    # Not the logged losses: a node that was told to stop may have saved between two of them.
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "undisturbed"))
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(ours[name], weight, rtol=0, atol=1e-6), name
