"""Fixtures for the tests of the models."""

from functools import cache
from pathlib import Path

import pytest

from tests.models.architectures import GPT2, ModelCase, StockDir


@pytest.fixture(scope="session")
def stock_dir(tmp_path_factory: pytest.TempPathFactory) -> StockDir:
    """A function from architecture, head and variant to a directory that stock saved; not to be written to."""

    @cache
    def directory(case: ModelCase = GPT2, head: str | None = None, variant: str = "base") -> Path:
        path = tmp_path_factory.mktemp("-".join((case.name, head or "", variant)))
        return case.save_stock(path, head, **case.variants[variant])

    return directory
