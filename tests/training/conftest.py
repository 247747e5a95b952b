"""Fixtures for the tests of training."""

from pathlib import Path

import pytest

from tests.models.architectures import GPT2


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock GPT-2 of one layer; not to be written to."""
    return GPT2.save_stock(tmp_path_factory.mktemp("gpt2"), num_hidden_layers=1)
