"""Fixtures for the tests of the models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.models.reference import VARIANTS, save_stock


@pytest.fixture(scope="session")
def stock_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a variant's name to a directory that stock GPT2LMHeadModel saved; not to be written to."""

    @cache
    def directory(variant: str = "base") -> Path:
        return save_stock(tmp_path_factory.mktemp(f"stock-{variant}"), **VARIANTS[variant])

    return directory
