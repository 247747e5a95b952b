"""The Auto classes: ours for our configuration, and the stock ones, untouched, for stock configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, BertTokenizerFast

from hf_megatron import MegatronBertConfig
from tests.models.bert.reference import (
    HEADS,
    PLACEMENTS,
    TINY,
    BertDir,
    auto_class,
    our_class,
    save_stock_bert,
    stock_class,
)
from tests.models.reference import save_stock
from tests.repository import ROOT


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_auto_classes_find_ours(bert_dir: BertDir, tmp_path: Path, placement: str, head: str) -> None:
    """Catches a head that is not registered, and a saved directory that comes back as the stock class."""
    auto, stock = getattr(transformers, auto_class(head)), bert_dir(placement, head)
    config = MegatronBertConfig.from_pretrained(stock)
    assert config.layernorm_placement == placement
    assert type(auto.from_config(config)) is our_class(head)
    model = auto.from_pretrained(stock, config=config)
    assert type(model) is our_class(head)
    model.save_pretrained(tmp_path)
    assert type(auto.from_pretrained(tmp_path)) is our_class(head)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MegatronBertConfig)
    assert AutoConfig.from_pretrained(tmp_path).layernorm_placement == placement


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModelForNextSentencePrediction"])
def test_heads_that_are_not_offered_raise(bert_dir: BertDir, tmp_path: Path, auto: str, placement: str) -> None:
    """Catches a stock model built quietly: stock has these heads, under the name of this configuration's export."""
    model = our_class("ForPreTraining").from_pretrained(bert_dir(placement))
    model.save_pretrained(tmp_path)
    for make in (
        lambda: getattr(transformers, auto).from_config(model.config),
        lambda: getattr(transformers, auto).from_pretrained(tmp_path),
        lambda: getattr(transformers, auto).from_pretrained(bert_dir(placement), config=model.config),
    ):
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            make()


def test_tokenizer_of_a_saved_directory(tmp_path: Path) -> None:
    """Catches a model type that no tokenizer is known for."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "word", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    MegatronBertConfig(**TINY).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, BertTokenizerFast)
    assert tokenizer.tokenize("a words") == ["a", "word", "##s"]
    assert tokenizer("a", "word")["token_type_ids"] == [0, 0, 0, 1, 1]


# Loads every stock directory through every Auto class that takes it, before and after the import.
_BEFORE_AND_AFTER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto

AUTO = [name for name in dir(transformers) if name.startswith("AutoModel") and "TF" not in name]
STOCK = (transformers.BertConfig, transformers.MegatronBertConfig, transformers.GPT2Config)

def state():
    report = {"attention": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())}
    for config_class in STOCK:
        for name in AUTO:
            mapping = getattr(getattr(transformers, name), "_model_mapping", {})
            report[config_class.__name__ + name] = repr(mapping[config_class]) if config_class in mapping else None
        report[config_class.__name__] = repr(tokenization_auto.TOKENIZER_MAPPING[config_class])
    for path, (auto, ids) in json.loads(sys.argv[1]).items():
        model, info = getattr(transformers, auto).from_pretrained(path, output_loading_info=True)
        config = transformers.AutoConfig.from_pretrained(path)
        output = model(torch.tensor(ids)).to_tuple()[0].double()
        report[path] = [repr(type(model)), repr(type(model.config)), repr(type(config)), config.to_dict(), str(info)]
        report[path] += [output.sum().item(), output.abs().max().item(), model._tp_plan]
    return report

before = state()
assert "hf_megatron" not in sys.modules
import hf_megatron
from hf_megatron import MegatronBertForPreTraining, MegatronGPT2LMHeadModel
after = state()
assert before == after, [(key, before[key], after[key]) for key in before if before[key] != after[key]]
"""


@pytest.mark.slow
def test_importing_changes_nothing_about_stock(tmp_path: Path) -> None:
    """Catches a stock model that this package's mere presence turns into another one."""
    ids = [[5, 7, 11, 13]]
    directories = {}
    for placement in PLACEMENTS:
        for head in HEADS:
            path = save_stock_bert(tmp_path / placement / head, placement, head)
            directories[str(path)] = (auto_class(head), [ids] if head == "ForMultipleChoice" else ids)
        for head, auto in (("ForNextSentencePrediction", "AutoModelForNextSentencePrediction"),):
            path = save_stock_bert(tmp_path / placement / head, placement, head)
            directories[str(path)] = (auto, ids)
    directories[str(save_stock(tmp_path / "gpt2"))] = ("AutoModelForCausalLM", ids)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _BEFORE_AND_AFTER, json.dumps(directories)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-4000:]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_stock_and_ours_live_side_by_side(bert_dir: BertDir, placement: str) -> None:
    """Catches the one resolving to the other in a process that uses both."""
    stock = transformers.AutoModel.from_pretrained(bert_dir(placement))
    assert type(stock) is stock_class(placement, "Model")
    ours = our_class("Model").from_pretrained(bert_dir(placement))
    ids = torch.tensor([[5, 7, 11, 13]])
    torch.testing.assert_close(ours(ids).last_hidden_state, stock(ids).last_hidden_state)
