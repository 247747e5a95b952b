"""Fixtures for the tests of the models."""

import pytest

from tests.models.architectures import StockDir


@pytest.fixture(scope="session")
def stock_dir(tmp_path_factory: pytest.TempPathFactory) -> StockDir:
    return StockDir(tmp_path_factory.mktemp("stock"))
