"""What a user can rely on importing."""

from __future__ import annotations

import importlib
import tomllib

import pytest

import hf_megatron
from tests.repository import ROOT

PUBLIC = [
    "MegatronBertConfig",
    "MegatronBertForMaskedLM",
    "MegatronBertForMultipleChoice",
    "MegatronBertForPreTraining",
    "MegatronBertForQuestionAnswering",
    "MegatronBertForSequenceClassification",
    "MegatronBertForTokenClassification",
    "MegatronBertModel",
    "MegatronGPT2Config",
    "MegatronGPT2ForQuestionAnswering",
    "MegatronGPT2ForSequenceClassification",
    "MegatronGPT2ForTokenClassification",
    "MegatronGPT2LMHeadModel",
    "MegatronGPT2Model",
    "MegatronTrainer",
    "__version__",
]


def test_public_names() -> None:
    """Catches a public name added, lost or renamed by accident. Changing this list is changing the contract."""
    assert sorted(hf_megatron.__all__) == PUBLIC
    assert dir(hf_megatron) == PUBLIC


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_public_names_are_classes_of_their_own_name(name: str) -> None:
    """Catches an exported name that does not resolve, or resolves to something else."""
    public = getattr(hf_megatron, name)
    assert public.__module__.startswith("hf_megatron.")
    # Under its public name transformers would take this class for its own MegatronBertConfig.
    assert public.__name__ == ("ParallelBertConfig" if name == "MegatronBertConfig" else name)


def test_one_version_everywhere() -> None:
    """Catches a release whose citation or changelog has another version; the source distribution's is tested there."""
    version = hf_megatron.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{version}] - 20" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_command_exists() -> None:
    """Catches a console script that points at nothing."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = metadata["scripts"]["hf-megatron"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
