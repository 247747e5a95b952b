"""The Auto classes: ours for our ``model_type``, and stock transformers as if this package were not there."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    GPT2TokenizerFast,
)
from transformers.distributed import DistributedConfig

import hf_megatron
from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.models.registration import register
from tests.models.reference import TINY, Pool, assert_all_equal, full_weights, run_at, save_distributed

StockDir = Callable[[str], Path]

HEADS = {
    "AutoModel": "GPT2Model",
    "AutoModelForCausalLM": "GPT2LMHeadModel",
    "AutoModelForSequenceClassification": "GPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "GPT2ForTokenClassification",
    "AutoModelForQuestionAnswering": "GPT2ForQuestionAnswering",
}


@pytest.mark.parametrize(("auto", "name"), HEADS.items())
def test_auto_classes_know_ours(tmp_path: Path, auto: str, name: str) -> None:
    """Catches a head that is not registered, and a directory of ours that comes back as another class."""
    auto_class, expected = getattr(transformers, auto), getattr(hf_megatron, f"Megatron{name}")
    model = auto_class.from_config(MegatronGPT2Config(**TINY))
    assert type(model) is expected
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MegatronGPT2Config
    again = auto_class.from_pretrained(tmp_path)
    assert type(again) is expected
    assert_all_equal(full_weights(again), full_weights(model))


@pytest.mark.parametrize(("auto", "name"), HEADS.items())
def test_stock_stays_stock(stock_dir: StockDir, auto: str, name: str) -> None:
    """Catches a registration that takes over what other code of the process loads."""
    register()  # a second time changes nothing either
    auto_class, expected = getattr(transformers, auto), getattr(transformers, name)
    assert type(AutoConfig.from_pretrained(stock_dir("base"))) is GPT2Config
    assert type(auto_class.from_config(GPT2Config(**TINY))) is expected
    assert type(auto_class.from_pretrained(stock_dir("base"))) is expected


def test_only_configurations_of_ours_are_registered() -> None:
    """Catches an entry under a stock class: what is registered takes precedence over what transformers ships."""
    auto = importlib.import_module("transformers.models.auto.auto_factory")
    mappings = [
        value
        for module in ("modeling_auto", "tokenization_auto")
        for value in vars(importlib.import_module(f"transformers.models.auto.{module}")).values()
        if isinstance(value, auto._LazyAutoMapping)
    ]
    registered = {config_class for mapping in mappings for config_class in mapping._extra_content}
    assert MegatronGPT2Config in registered
    assert {config_class.__module__.split(".")[0] for config_class in registered} == {"hf_megatron"}
    types = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING._extra_content
    assert all(name.startswith("megatron_") for name in types)


def test_a_head_we_do_not_offer_is_an_error() -> None:
    """Catches a stock class built, unsharded, from a config of ours."""
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*MegatronGPT2Config"):
        AutoModelForMaskedLM.from_config(MegatronGPT2Config(**TINY))


def _auto_load(stock: Path, directory: Path, tp_size: int) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """A stock directory with our config, and one of ours without, each on this many ranks."""
    layouts: tuple[object, ...] = (None,)
    if tp_size > 1:
        layouts = (DistributedConfig(tp_size=tp_size), {"tp_size": tp_size}, DistributedConfig(tp_plan="auto"))
    results = []
    for layout in layouts:
        for model in (
            AutoModelForCausalLM.from_pretrained(
                stock, config=MegatronGPT2Config.from_pretrained(stock), distributed_config=layout
            ),
            AutoModelForCausalLM.from_pretrained(directory, distributed_config=layout),
            MegatronGPT2LMHeadModel.from_pretrained(stock, distributed_config=layout),
        ):
            assert (model.tp_size or 1) == tp_size
            assert model.config.model_type == "megatron_gpt2"
            results.append((type(model).__name__, full_weights(model)))
    return results


@pytest.mark.parametrize("tp_size", [1, 2])
def test_auto_classes_load_on_ranks(pool: Pool, stock_dir: StockDir, tmp_path: Path, tp_size: int) -> None:
    """Catches the Auto class going its own way with ``config=`` or ``distributed_config=``."""
    run_at(pool, 2, save_distributed, stock_dir("base"), tmp_path, 2)
    expected = full_weights(MegatronGPT2LMHeadModel.from_pretrained(stock_dir("base")))
    for results in run_at(pool, tp_size, _auto_load, stock_dir("base"), tmp_path, tp_size):
        for class_name, weights in results:
            assert class_name == "MegatronGPT2LMHeadModel"
            assert_all_equal(weights, expected)


def test_a_stock_config_is_read_as_ours(stock_dir: StockDir) -> None:
    """Catches sizes or options that are lost when a stock config.json is read."""
    ours, stock = (
        MegatronGPT2Config.from_pretrained(stock_dir("untied")),
        GPT2Config.from_pretrained(stock_dir("untied")),
    )
    assert ours.model_type == "megatron_gpt2"
    assert {**ours.to_dict(), "model_type": "gpt2"} == stock.to_dict()
    assert MegatronGPT2Config.from_dict(stock.to_dict()).model_type == "megatron_gpt2"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> GPT2TokenizerFast:
    """A small tokenizer of GPT-2's kind."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["to be or not to be, that is the question"] * 3, vocab_size=280, show_progress=False)
    directory = tmp_path_factory.mktemp("tokenizer")
    trained.save_model(str(directory))
    return GPT2TokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("files", ["all", "vocabulary only"])
def test_auto_tokenizer(tokenizer: GPT2TokenizerFast, tmp_path: Path, files: str) -> None:
    """Catches a directory of ours whose tokenizer AutoTokenizer cannot find, with and without its own config file."""
    MegatronGPT2LMHeadModel(MegatronGPT2Config(**TINY)).save_pretrained(tmp_path)
    if files == "all":
        tokenizer.save_pretrained(tmp_path)
    else:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(Path(tokenizer.name_or_path) / name, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "that is not the question"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "megatron_gpt2"
