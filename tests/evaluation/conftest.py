"""Fixtures for the tests of the evaluations, and which of them need more than the repository."""

import os
from pathlib import Path

import pytest

from tests.evaluation.models import save_model

# The paper's data lies outside of it.
collect_ignore = [] if "HF_MEGATRON_EVALUATION_DATA" in os.environ else ["test_real_data.py"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained stock GPT-2 with its tokenizer; not to be written to."""
    return save_model(tmp_path_factory.mktemp("evaluated"))
