"""The tables against the stock models."""

import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from hf_megatron.architectures import BERT_POST, BERT_PRE, GPT2, TABLES, Architecture, table_for
from hf_megatron.errors import PartitionError, UnsupportedError
from hf_megatron.partition import FusedSplit, Replicated, Split, VocabSplit

_TABLES = {table.stock_model_type: table for table in TABLES}
_SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 131}
_GPT2_XL = {"n_embd": 1600, "n_layer": 48, "n_head": 25}
# The published sizes of GPT-2; defaults; GPT-2's sizes under their general names.
_CONFIGS: list[tuple[Architecture, str, dict[str, Any]]] = [
    *((table, table.classes[0].stock, {}) for table in _TABLES.values()),
    (GPT2, "GPT2LMHeadModel", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    (GPT2, "GPT2LMHeadModel", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    (GPT2, "GPT2LMHeadModel", _GPT2_XL),
    (GPT2, "GPT2ForTokenClassification", {**_SMALL, "max_position_embeddings": 64, "num_labels": 7}),
]


def _stock_shapes(table: Architecture, stock_class: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the stock model saves, what is tied left out; nothing is allocated."""
    with torch.device("meta"):
        model = getattr(transformers, stock_class)(config)
    tied = table.model_class(stock_class).tied if config.tie_word_embeddings else {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _table_shapes(table: Architecture, stock_class: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The same by the table; under every name that a tensor has, its spec is found."""
    tensors = table.tensors(config, table.model_class(stock_class))
    for name, tensor in tensors.items():
        assert name == tensor.name
        assert table.spec_of(name) == table.spec_of(name.removeprefix("transformer.")) == tensor.spec
        assert not table.is_obsolete(name)
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize(("table", "stock_class", "config"), _CONFIGS)
def test_tensors_of_the_published_sizes(table: Architecture, stock_class: str, config: dict[str, Any]) -> None:
    """Catches a config.json that leaves out a size, or has its general name, read as another model; layers lost."""
    stock = _stock_shapes(table, stock_class, CONFIG_MAPPING[table.stock_model_type](**config))
    assert _table_shapes(table, stock_class, config) == stock


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("kind", "stock_class"), [(kind, c.stock) for kind, t in _TABLES.items() for c in t.classes])
def test_tensors_of_every_class(kind: str, stock_class: str, is_tied: bool) -> None:
    """Catches a head, a pooler or a prefix that differs from the stock class, and tied tensors listed twice."""
    table = _TABLES[kind]
    inner = {"n_inner" if kind == "gpt2" else "intermediate_size": 100}
    sizes = {**_SMALL, **inner, "num_labels": 5, "tie_word_embeddings": is_tied}
    config = CONFIG_MAPPING[kind](**sizes)
    shapes = _table_shapes(table, stock_class, config.to_dict())
    assert shapes == _stock_shapes(table, stock_class, config)
    assert ("lm_head.weight" in shapes) == (stock_class == "GPT2LMHeadModel" and not is_tied)


def test_gpt2_is_cut_as_in_the_paper() -> None:
    """Catches a cut along the wrong dimension of GPT-2's [in, out] weights, which at degree 1 nobody notices."""
    assert {rule.name: rule.spec for rule in GPT2.rules if rule.spec != Replicated()} == {
        "wte.weight": VocabSplit(),
        "h.*.attn.c_attn.weight": FusedSplit(1, 3),
        "h.*.attn.c_attn.bias": Replicated(used=FusedSplit(0, 3)),
        "h.*.attn.c_proj.weight": Split(0),
        "h.*.mlp.c_fc.weight": Split(1),
        "h.*.mlp.c_fc.bias": Split(0),
        "h.*.mlp.c_proj.weight": Split(0),
        "lm_head.weight": VocabSplit(),
    }
    assert GPT2.module_specs("h.*.attn.c_attn") == {"weight": FusedSplit(1, 3), "bias": Replicated(FusedSplit(0, 3))}


@pytest.mark.parametrize("table", [BERT_PRE, BERT_POST], ids=["pre", "post"])
def test_bert_is_cut_as_in_the_paper(table: Architecture) -> None:
    """Catches a cut along the wrong dimension of BERT's [out, in] weights, and a bias that is not cut like its rows."""
    columns = ["attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"]
    assert {rule.name: rule.spec for rule in table.rules if rule.spec != Replicated()} == {
        "embeddings.word_embeddings.weight": VocabSplit(),
        **{f"encoder.layer.*.{name}.{kind}": Split(0) for name in columns for kind in ("weight", "bias")},
        "encoder.layer.*.attention.output.dense.weight": Split(1),
        "encoder.layer.*.output.dense.weight": Split(1),
        **{f"cls.predictions.{name}": VocabSplit() for name in ("bias", "decoder.weight", "decoder.bias")},
    }


def test_names_that_are_no_parameter() -> None:
    """Catches a name that is guessed at, and an old checkpoint that is refused for its causal masks."""
    with pytest.raises(PartitionError, match=r"h\.0\.attn\.c_attn\.gamma is not a parameter"):
        GPT2.spec_of("h.0.attn.c_attn.gamma")
    obsolete = ["h.3.attn.bias", "transformer.h.11.attn.bias", "transformer.h.0.attn.masked_bias"]
    assert all(map(GPT2.is_obsolete, obsolete))


_NARROW = {"n_embd": 8, "n_head": 4, "n_layer": 1}


@pytest.mark.parametrize(
    ("table", "config", "tp_size", "message"),
    [
        (GPT2, _GPT2_XL, 26, "num_attention_heads=25 is less than tp_size=26"),
        (BERT_POST, {}, 16, "num_attention_heads=12 is less than tp_size=16: some ranks would have no head; choose 12"),
        # A rank without tokens has no maximum of its logits.
        (GPT2, {**_NARROW, "vocab_size": 5}, 4, "transformer.wte.weight has 5 entries along dim 0; "),
        (GPT2, {**_NARROW, "n_inner": 5}, 4, "h.0.mlp.c_fc.weight has 5 entries along dim 1"),
        (GPT2, {}, 0, "tp_size=0 is not a degree; choose 1 or more"),
    ],
)
def test_degrees_that_do_not_fit(table: Architecture, config: dict[str, Any], tp_size: int, message: str) -> None:
    """Catches a check of heads, of vocabulary or of one model alone, a division by zero, a refusal without advice."""
    with pytest.raises(PartitionError, match=re.escape(message)):
        table.check_degree(config, tp_size)


def test_degrees_that_fit_are_not() -> None:
    """Catches a refusal of what the message of another refusal advises."""
    for tp_size in (1, 2, 5, 8, 25):
        GPT2.check_degree(_GPT2_XL, tp_size)
    GPT2.check_degree({**_NARROW, "vocab_size": 7}, 4)


@pytest.mark.parametrize(
    ("kinds", "config", "message"),
    [
        (_TABLES, {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        (_TABLES, {"hidden_size": 100, "num_attention_heads": 12}, "=100 is not divisible by num_attention_heads=12"),
        (["megatron-bert", "bert"], {"is_decoder": True}, "is_decoder=True is not supported"),
        (["megatron-bert", "bert"], {"position_embedding_type": "relative_key"}, "='relative_key' is not supported"),
        (["gpt2"], {"n_embd": "768"}, "n_embd='768' in the configuration is not a positive integer"),
    ],
)
def test_configurations_that_cannot_be_honoured(kinds: Iterable[str], config: dict[str, Any], message: str) -> None:
    """Catches a model that is built, and computes something else than the configuration says."""
    for kind in kinds:
        with pytest.raises(UnsupportedError, match=message):
            _TABLES[kind].sizes(config)


def test_the_table_is_found_by_type_and_placement() -> None:
    """Catches a spelling that is not known, and one placement taken for the other, whose function differs."""
    types = {"gpt2": GPT2, "megatron_gpt2": GPT2, "bert": BERT_POST, "megatron-bert": BERT_PRE}
    assert {name: table_for({"model_type": name}) for name in types} == types
    for placement, table in (("post", BERT_POST), ("pre", BERT_PRE)):
        assert table_for({"model_type": "megatron_bert", "layernorm_placement": placement}) is table


def test_what_has_no_table_is_refused() -> None:
    """Catches an unknown type that is taken for GPT-2, and a head that is dropped without a word."""
    with pytest.raises(UnsupportedError, match=r"model_type 'llama' .*is not supported; known are gpt2, megatron_gpt2"):
        table_for({"model_type": "llama"})
    with pytest.raises(UnsupportedError, match="layernorm_placement='sandwich'"):
        table_for({"model_type": "megatron_bert", "layernorm_placement": "sandwich"})
    with pytest.raises(UnsupportedError, match="'GPT2DoubleHeadsModel' is not one of the gpt2 classes"):
        GPT2.model_class("GPT2DoubleHeadsModel")


def test_classes_are_found_under_both_names() -> None:
    """Catches a class that is offered under one name only."""
    for table in _TABLES.values():
        assert all(table.model_class(c.stock) is table.model_class(c.ours) is c for c in table.classes)
