"""Fixtures for the tests of the evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.models import save_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained stock GPT-2 with its tokenizer; not to be written to."""
    return save_model(tmp_path_factory.mktemp("evaluated"))
