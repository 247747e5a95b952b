"""The command answers at once: nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tests.repository import ROOT

_HELP = "import sys; sys.argv = ['hf-megatron', '--help']; from hf_megatron.commands.cli import main; main()"
_HEAVY = {"accelerate", "datasets", "numpy", "safetensors", "tokenizers", "torch", "transformers"}


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}"}
    command = [sys.executable, *options, "-c", _HELP]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


def test_help_imports_nothing_heavy() -> None:
    """Catches a top-level import that makes `--help` (and shell completion) wait for torch or transformers."""
    imported = {line.rpartition("|")[2].strip() for line in _run("-X", "importtime").stderr.splitlines()}
    assert "hf_megatron.commands.cli" in imported
    assert not imported & _HEAVY


def test_help_answers_within_a_second() -> None:
    """Catches slow start-up of any other kind. The best of three, as other processes may be busy."""

    def seconds() -> float:
        start = time.perf_counter()
        assert "quickstart" in _run().stdout
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1.0
