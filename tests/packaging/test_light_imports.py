"""What can be imported without waiting for torch and transformers, and that the Auto classes learn of our models."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.repository import environment

_HEAVY = {"numpy", "safetensors", "torch", "transformers"}


def _run(program: str) -> set[str]:
    """The words that a program prints in a fresh interpreter."""
    return set(subprocess.check_output([sys.executable, "-c", program], env=environment(), text=True).split())


@pytest.mark.parametrize(
    "statement",
    [
        "import hf_megatron",
        "import hf_megatron.partition, hf_megatron.architectures, hf_megatron.checkpoint, hf_megatron.planning",
        "from hf_megatron_conversion import convert, inspect, verify",
    ],
)
def test_imports_are_light(statement: str) -> None:
    """Catches an import that makes every command, and every message about a wrong degree, wait for seconds."""
    assert not _HEAVY & _run(f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})")


@pytest.mark.parametrize("packages", ["hf_megatron, transformers", "transformers, hf_megatron"])
def test_auto_classes_know_our_models(packages: str) -> None:
    """Catches models that are registered in one order of the imports only."""
    program = (
        f"import {packages}; config = transformers.AutoConfig.for_model('megatron_gpt2', n_embd=8, n_head=1)\n"
        "print(type(transformers.AutoModel.from_config(config)).__name__)"
    )
    assert _run(program) == {"MegatronGPT2Model"}
