"""Masks that are made without reading anything back, as on an accelerator, against those of stock transformers."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_megatron.models.forward_arguments import CACHE
from tests.models.architectures import ARCHITECTURES, GPT2, B, ModelCase, S, StockDir, token_ids
from tests.models.reference import assert_agrees

_AHEAD = mock.patch("hf_megatron.models.masks._is_read_freely", return_value=False)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_mask_that_is_not_read(stock_dir: StockDir, case: ModelCase, padding: str, kernel: str) -> None:
    """Catches a mask that is left out, and causal attention that is not, where nobody looks whether it matters."""
    model = case.load(stock_dir(case), dtype=torch.float64, attn_implementation=kernel).eval()
    batch = case.inputs(None, padding)
    for mask in (batch.pop("attention_mask", torch.ones(B, S, dtype=torch.long)), None):
        given = batch if mask is None else {**batch, "attention_mask": mask}
        seen = slice(None) if mask is None else mask.bool()
        expected = model(**given)[0]
        with _AHEAD:
            assert_agrees("logits", model(**given)[0][seen], expected[seen])


_POSITIONS = {
    "in order": torch.arange(S),
    "from another place": torch.arange(S) + 5,
    "anew": torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3]),
    "anew in one row only": torch.stack([torch.arange(S), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])]),
    "with a gap": torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 10]),
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", _POSITIONS)
def test_positions_that_are_not_read(stock_dir: StockDir, name: str, use_cache: bool) -> None:
    """Catches documents that see each other on an accelerator only, or are torn apart where positions have a gap."""
    model = GPT2.load(stock_dir(GPT2), dtype=torch.float64).eval()
    positions = _POSITIONS[name]
    positions = positions if positions.dim() > 1 else positions[None]
    ids = token_ids(2, S)
    given: dict[str, Any] = {"input_ids": ids, "position_ids": positions.expand(2, -1), "use_cache": use_cache}
    expected = model(**given).logits
    with _AHEAD:
        assert_agrees("logits", model(**given).logits, expected)


@pytest.mark.parametrize("make_cache", [DynamicCache, partial(StaticCache, max_cache_len=16)])
@pytest.mark.parametrize("has_mask", [True, False])
def test_decoding_without_reading(stock_dir: StockDir, has_mask: bool, make_cache: Any) -> None:
    """Catches tokens that see the empty places of a static cache, or not those before them."""
    model = GPT2.load(stock_dir(GPT2), dtype=torch.float64).eval()
    ids, mask = token_ids(2, S), torch.ones(2, S, dtype=torch.long)
    expected = model(ids).logits
    cache, logits = make_cache(config=model.config), []
    with _AHEAD, torch.no_grad():
        for start, stop in ((0, 6), (6, 7), (7, 9)):
            given = {"attention_mask": mask[:, :stop]} if has_mask else {}
            logits.append(model(ids[:, start:stop], use_cache=True, **{CACHE: cache}, **given).logits)
    assert_agrees("logits", torch.cat(logits, 1), expected)
