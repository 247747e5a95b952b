"""Which class a checkpoint is of, where config.json names one that lacks some of what is stored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron.architectures import BERT_POST, table_for
from hf_megatron.checkpoint import open_checkpoint, require_complete, stored_model
from hf_megatron.errors import CheckpointFormatError
from tests.checkpoint.directories import BERT_CONFIG, CONFIG, Tensors, model_tensors, write_hub


def _config(named: str, base: dict[str, Any] = BERT_CONFIG, **changes: Any) -> dict[str, Any]:
    return {**base, "architectures": [named], **changes}


def _found(directory: Path, tensors: Tensors, config: dict[str, Any]) -> str:
    """The class found, or nothing where what is stored is no model at all."""
    checkpoint = open_checkpoint(write_hub(directory, tensors, config))
    model_class, canonical = stored_model(checkpoint.tensors, table_for(config), config)
    try:
        require_complete(canonical)
    except CheckpointFormatError as error:
        assert "unknown" in str(error)  # noqa: PT017 (what is listed is the named class's view)
        return ""
    return model_class.stock


def test_the_published_bert_is_a_pretraining_model(tmp_path: Path) -> None:
    """Catches bert-base-uncased refused, or converted without its pooler and its second head.

    It is spelled as it lies on the Hub: gamma and beta, and both copies of what is tied.
    """
    tensors = model_tensors(_config("BertForPreTraining"))
    old = {name: re.sub(r"weight$", "gamma", re.sub(r"bias$", "beta", name)) for name in tensors if "LayerNorm" in name}
    stored = {old.get(name, name): tensor for name, tensor in tensors.items()}
    stored["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    config = _config("BertForMaskedLM")
    assert _found(tmp_path, stored, config) == "BertForPreTraining"
    _, canonical = stored_model(open_checkpoint(tmp_path).tensors, BERT_POST, config)
    assert list(canonical.tensors) == list(tensors)


@pytest.mark.parametrize("named", [model_class.stock for model_class in BERT_POST.classes])
def test_the_named_class_is_kept_where_it_has_everything(tmp_path: Path, named: str) -> None:
    """Catches a class chosen by its tensors alone: those of several heads have the same names and shapes."""
    config = _config(named, num_labels=1)
    assert _found(tmp_path, model_tensors(config), config) == named


@pytest.mark.parametrize(
    ("named", "stored", "num_labels", "found"),
    [
        *(("BertModel", f"BertFor{head}", 3, f"BertFor{head}") for head in ("PreTraining", "MultipleChoice")),
        ("BertForTokenClassification", "BertForSequenceClassification", 3, "BertForSequenceClassification"),
        # With a single label two classes have the same tensors: no guess.
        ("BertModel", "BertForMultipleChoice", 1, ""),
    ],
)
def test_the_class_that_has_everything_is_found(
    tmp_path: Path, named: str, stored: str, num_labels: int, found: str
) -> None:
    """Catches heads told apart by names only, where one has num_labels rows and another a single one, and a guess."""
    tensors = model_tensors(_config(stored, num_labels=num_labels))
    assert _found(tmp_path, tensors, _config(named, num_labels=num_labels)) == found


def test_what_no_class_has_is_refused(tmp_path: Path) -> None:
    """Catches tensors left out because most of the others fit some class."""
    tensors = model_tensors(_config("BertForPreTraining"))
    assert _found(tmp_path, {**tensors, "extra": torch.zeros(1)}, _config("BertForMaskedLM")) == ""
    del tensors["cls.seq_relationship.bias"]
    assert _found(tmp_path, tensors, _config("BertForMaskedLM")) == ""


def test_where_no_class_is_named_the_first_one_may_give_way(tmp_path: Path) -> None:
    """Catches a classifier without a name in config.json refused for the one tensor that makes it one."""
    tensors = model_tensors(_config("GPT2ForSequenceClassification", CONFIG))
    unnamed = {name: value for name, value in CONFIG.items() if name != "architectures"}
    assert _found(tmp_path, tensors, unnamed) == "GPT2ForSequenceClassification"
