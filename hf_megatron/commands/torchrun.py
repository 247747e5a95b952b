"""Ranks on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def run_ranks(module: str, arguments: Sequence[str], num_ranks: int, **environment: str) -> int:
    """Run a module under torchrun, and return the exit code. Its stdout goes to stderr: stdout is for results."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += ["-m", module, *arguments]
    return subprocess.run(command, env=os.environ | environment, stdout=sys.stderr.fileno(), check=False).returncode
