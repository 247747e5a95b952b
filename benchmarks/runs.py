"""Trainings as the scripts start them: examples on several ranks, and many small ones side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["flags", "ranks", "run_all", "run_example"]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
Run = TypeVar("Run")


def flags(options: Mapping[str, Any]) -> list[str]:
    """``{"learning_rate": 1}`` as ``["--learning-rate=1"]``."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def ranks(number: int) -> str:
    """How many, for a figure."""
    return f"{number} ranks" if number > 1 else "one process"


def run_example(name: str, tp_size: int, output: Path, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Run an example on ``tp_size`` ranks with one thread each; returns what Trainer logged until it saved last."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp_size}"] if tp_size > 1 else []
    command = [sys.executable, *launcher, str(EXAMPLES / f"{name}.py"), f"--output={output}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, "--keep-activations"], env=environment, check=True)
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    return list(state["log_history"])


def run_all(
    train: Callable[..., dict[str, Any]], wanted: Sequence[Run], *shared: Any, workers: int
) -> list[dict[str, Any]]:
    """Call ``train(run, *shared)`` for every run.

    Args:
        train: A function of a module; it should use one thread. Its result has ``cpu_seconds``.
        wanted: The runs, long ones first, so that none is waited for at the end.
        *shared: What all of them get.
        workers: How many at a time, each in a process of its own; a single one stays in this process.

    Returns:
        The results, in the order of ``wanted``.
    """
    processes = multiprocessing.get_context("spawn")
    executor: Executor = ProcessPoolExecutor(workers, processes) if workers > 1 else ThreadPoolExecutor(1)
    with executor:
        futures = {executor.submit(train, run, *shared): run for run in wanted}
        for future in as_completed(futures):
            print(f"{futures[future]}: {future.result()['cpu_seconds']} s", flush=True)
    return [future.result() for future in futures]
