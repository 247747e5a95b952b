"""The command answers at once: nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

from tests.repository import environment

_HELP = "import sys; sys.argv = ['hf-megatron', '--help']; from hf_megatron.commands.cli import main; main()"
_HEAVY = {"accelerate", "datasets", "numpy", "safetensors", "tokenizers", "torch", "transformers"}


def test_help_imports_nothing_heavy() -> None:
    """Catches a top-level import that makes `--help` (and shell completion) wait for torch or transformers."""
    command = [sys.executable, "-X", "importtime", "-c", _HELP]
    done = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "quickstart" in done.stdout
    assert "hf_megatron.commands.cli" in imported
    assert not imported & _HEAVY
