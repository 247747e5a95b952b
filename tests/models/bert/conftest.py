"""Fixtures for the tests of BERT."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.models.bert.reference import VARIANTS, BertDir, save_stock_bert


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> BertDir:
    """A function from placement, head and variant to a directory that the stock class saved; not to be written to."""

    @cache
    def directory(placement: str, head: str = "ForPreTraining", variant: str = "base") -> Path:
        path = tmp_path_factory.mktemp(f"{placement}-{head}-{variant}")
        return save_stock_bert(path, placement, head, **VARIANTS[variant])

    return directory
