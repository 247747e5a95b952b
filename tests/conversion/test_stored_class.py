"""Directories that hold more than the class which their config.json names, as bert-base-uncased does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM, BertForPreTraining

from hf_megatron.errors import CheckpointFormatError
from hf_megatron_conversion import convert, inspect, verify
from tests.conversion.checkpoints import hub_bytes, read_config, read_tensors, save_stock, there_and_back, write_hub


def test_what_the_named_class_lacks_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches the published BERT refused, or its pooler and second head lost on the way, or kept without a word."""
    source = save_stock(tmp_path / "stock", model_class=BertForPreTraining)
    write_hub(source, read_tensors(source), {**read_config(source), "architectures": ["BertForMaskedLM"]})
    assert inspect(source).model_class == "BertForPreTraining"
    with caplog.at_level(logging.WARNING, logger="hf_megatron_conversion"):
        tp, hub = there_and_back(source, tmp_path, 2)
    assert "taken for a BertForPreTraining" in caplog.text
    assert "BertForMaskedLM" in caplog.text
    assert read_config(tp)["architectures"] == ["MegatronBertForPreTraining"]
    assert read_config(hub)["architectures"] == ["BertForPreTraining"]
    assert hub_bytes(hub) == hub_bytes(source)
    assert verify(source, tp, logits=True).equal


def test_what_fits_no_class_is_refused(tmp_path: Path) -> None:
    """Catches a tensor dropped because all others fit: a masked language model with a pooler is no class's."""
    source = save_stock(tmp_path / "stock", model_class=BertForMaskedLM)
    tensors = read_tensors(source)
    tensors["bert.pooler.dense.weight"], tensors["bert.pooler.dense.bias"] = torch.zeros(48, 48), torch.zeros(48)
    write_hub(source, tensors, read_config(source))
    with pytest.raises(CheckpointFormatError, match=r"unknown: bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight"):
        convert(source, tmp_path / "hub", to="hub")
    assert not (tmp_path / "hub").exists()
