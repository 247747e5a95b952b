"""Checkpoints that many tests read and none changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conversion.checkpoints import save_stock
from tests.conversion.commands import Commands
from tests.repository import environment


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock GPT-2 language model whose head is the word embedding."""
    return save_stock(tmp_path_factory.mktemp("stock") / "tied")


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head of its own."""
    return save_stock(tmp_path_factory.mktemp("stock") / "untied", tie_word_embeddings=False)


@pytest.fixture(params=["tied", "untied"])
def stock(request: pytest.FixtureRequest, tied: Path, untied: Path) -> Path:
    """Either of the two."""
    return tied if request.param == "tied" else untied


@pytest.fixture
def source(tied: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own."""
    return Path(shutil.copytree(tied, tmp_path / "source"))


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    """``hf-megatron``; the ranks that it starts import the repository's own code."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    return Commands(capfd)
