"""How the tests run the examples: in this process or on live ranks, which is quick, or by a launcher as people do."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from accelerate.state import AcceleratorState, GradientState, PartialState

from tests.repository import ROOT

_ACCELERATE = ["--mixed_precision=no", "--dynamo_backend=no", "--num_machines=1", "--main_process_port=0"]
LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node={processes}"],
    # With --cpu it would start one process, or ask for MPI; without a GPU the processes of --multi_gpu find the CPU.
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes={processes}", *_ACCELERATE],
}


def run_here(name: str, *arguments: str) -> None:
    """Run an example in this process, which may be a live rank."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    with patch("sys.argv", [f"{name}.py", *arguments]):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


def launch(launcher: str, name: str, *arguments: str, processes: int = 2) -> str:
    """Run an example by a launcher; returns what it printed."""
    options = [option.format(processes=processes) for option in LAUNCHERS[launcher]]
    done = subprocess.run(
        [sys.executable, *options, str(ROOT / "examples" / f"{name}.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: Path) -> list[float]:
    """The losses that Trainer logged, from the last checkpoint."""
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    return [float(entry["loss"]) for entry in state["log_history"] if "loss" in entry]
