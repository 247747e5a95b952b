"""What a model is in Megatron-LM's arguments, and which models it has not."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from hf_megatron.errors import UnsupportedError
from hf_megatron_conversion import convert

_TINY = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 61, "n_positions": 16}


def test_a_classification_head_is_refused(tmp_path: Path) -> None:
    """Catches a KeyError in place of a refusal: Megatron-LM has language models only."""
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**_TINY))
    model.save_pretrained(tmp_path / "hub")
    with pytest.raises(UnsupportedError, match=r"a GPT2ForSequenceClassification \(only language models\)"):
        convert(tmp_path / "hub", tmp_path / "m", to="megatron-lm", tp_size=2)


def test_two_rates_of_dropout_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a rate that is dropped without a word: Megatron-LM has one for embeddings and residual stream."""
    config = transformers.GPT2Config(**_TINY, embd_pdrop=0.3, resid_pdrop=0.2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "m", to="megatron-lm", tp_size=2)
    assert "one rate for embd_pdrop=0.3 and resid_pdrop=0.2" in caplog.text
