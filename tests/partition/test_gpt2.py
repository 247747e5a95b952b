"""The GPT-2 table against the stock models, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from transformers import GPT2Config

from hf_megatron.architectures import GPT2, table_for
from hf_megatron.errors import PartitionError, UnsupportedError
from hf_megatron.partition import FusedSplit, Replicated, Split, VocabSplit

SIZES = {
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
CLASSES = [model_class.stock for model_class in GPT2.classes]


def _stock_shapes(stock_class: str, config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the stock model's state dict, a tied head left out; nothing is allocated."""
    with torch.device("meta"):
        model = getattr(transformers, stock_class)(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _table_shapes(stock_class: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    tensors = GPT2.tensors(config, GPT2.model_class(stock_class))
    assert all(name == tensor.name for name, tensor in tensors.items())
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("size", SIZES)
def test_tensors_of_the_published_sizes(size: str) -> None:
    """Catches a name, shape or layer that differs from the stock model, and defaults that differ."""
    stock = _stock_shapes("GPT2LMHeadModel", GPT2Config(**SIZES[size]))
    ours = _table_shapes("GPT2LMHeadModel", SIZES[size])
    assert ours == stock


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("stock_class", CLASSES)
def test_tensors_of_every_class(stock_class: str, is_tied: bool) -> None:
    """Catches a head's tensor or a prefix that differs from the stock class, and a tied head that is listed twice."""
    config = GPT2Config(n_layer=2, n_inner=100, vocab_size=131, num_labels=5, tie_word_embeddings=is_tied)
    stock, ours = _stock_shapes(stock_class, config), _table_shapes(stock_class, config.to_dict())
    assert ours == stock
    assert ("lm_head.weight" in ours) == (stock_class == "GPT2LMHeadModel" and not is_tied)


def test_sizes_under_their_other_names() -> None:
    """Catches a config.json with the general names that is taken for one with the defaults."""
    general = {
        "max_position_embeddings": 64,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_labels": 7,
    }
    stock = _stock_shapes("GPT2ForTokenClassification", GPT2Config(**general))
    assert _table_shapes("GPT2ForTokenClassification", general) == stock


def test_cuts_are_the_papers() -> None:
    """Catches a cut along the wrong dimension of GPT-2's [in, out] weights, which at degree 1 nobody notices."""
    whole = Replicated()
    assert {rule.name: rule.spec for rule in GPT2.rules} == {
        "wte.weight": VocabSplit(),
        "wpe.weight": whole,
        "h.*.ln_1.weight": whole,
        "h.*.ln_1.bias": whole,
        "h.*.attn.c_attn.weight": FusedSplit(1, 3),
        "h.*.attn.c_attn.bias": Replicated(used=FusedSplit(0, 3)),
        "h.*.attn.c_proj.weight": Split(0),
        "h.*.attn.c_proj.bias": whole,
        "h.*.ln_2.weight": whole,
        "h.*.ln_2.bias": whole,
        "h.*.mlp.c_fc.weight": Split(1),
        "h.*.mlp.c_fc.bias": Split(0),
        "h.*.mlp.c_proj.weight": Split(0),
        "h.*.mlp.c_proj.bias": whole,
        "ln_f.weight": whole,
        "ln_f.bias": whole,
        "lm_head.weight": VocabSplit(),
        "score.weight": whole,
        "classifier.weight": whole,
        "classifier.bias": whole,
        "qa_outputs.weight": whole,
        "qa_outputs.bias": whole,
    }
    assert GPT2.module_specs("h.*.attn.c_attn") == {"weight": FusedSplit(1, 3), "bias": Replicated(FusedSplit(0, 3))}


@pytest.mark.parametrize("stock_class", CLASSES)
def test_spec_of_finds_every_tensor(stock_class: str) -> None:
    """Catches layers of two digits, prefixes and heads that a name is not recognised with."""
    tensors = GPT2.tensors({"n_layer": 12, "tie_word_embeddings": False}, GPT2.model_class(stock_class))
    for name, tensor in tensors.items():
        assert GPT2.spec_of(name) == tensor.spec
        assert GPT2.spec_of(name.removeprefix("transformer.")) == tensor.spec
        assert not GPT2.is_obsolete(name)
    with pytest.raises(PartitionError, match=r"h\.0\.attn\.c_attn\.gamma is not a parameter"):
        GPT2.spec_of("h.0.attn.c_attn.gamma")


@pytest.mark.parametrize("name", ["h.3.attn.bias", "transformer.h.11.attn.bias", "transformer.h.0.attn.masked_bias"])
def test_obsolete_buffers_are_known(name: str) -> None:
    """Catches an old checkpoint that is refused for its causal masks."""
    assert GPT2.is_obsolete(name)


def test_xl_at_degree_two_is_refused_with_the_degrees_that_fit() -> None:
    """Catches a refusal that leaves the user guessing, or that comes when the weights have been read."""
    message = "num_attention_heads=25 is not divisible by tp_size=2; choose 1, 5 or 25."
    with pytest.raises(PartitionError, match=f"^{re.escape(message)}$"):
        GPT2.check_degree(SIZES["gpt2-xl"], 2)
    for tp_size in (1, 5, 25):
        GPT2.check_degree(SIZES["gpt2-xl"], tp_size)


def test_a_vocabulary_that_leaves_a_rank_empty_is_refused() -> None:
    """Catches a rank without tokens, which has no maximum of its logits."""
    config = {"n_embd": 8, "n_head": 4, "n_layer": 1, "vocab_size": 5}
    with pytest.raises(PartitionError, match=r"transformer\.wte\.weight has 5 entries along dim 0; .* tp_size=4 ranks"):
        GPT2.check_degree(config, 4)
    GPT2.check_degree({**config, "vocab_size": 7}, 4)


def test_an_inner_size_that_leaves_a_rank_empty_is_refused() -> None:
    """Catches a check of heads and vocabulary only."""
    config = {"n_embd": 8, "n_head": 4, "n_layer": 1, "n_inner": 5}
    with pytest.raises(PartitionError, match=r"h\.0\.mlp\.c_fc\.weight has 5 entries along dim 1"):
        GPT2.check_degree(config, 4)


def test_degree_zero_is_refused() -> None:
    """Catches a division by zero in place of a message."""
    with pytest.raises(PartitionError, match="tp_size=0 is not a degree; choose 1 or more"):
        GPT2.check_degree({}, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ({"n_embd": 30, "n_head": 4}, "hidden_size=30 is not divisible by num_attention_heads=4"),
        ({"n_embd": "768"}, "n_embd='768' in the configuration is not a positive integer"),
    ],
)
def test_configurations_that_cannot_be_honoured_are_refused(config: dict[str, object], message: str) -> None:
    """Catches a model that is built, and computes something else than the configuration says."""
    with pytest.raises(UnsupportedError, match=message):
        GPT2.sizes(config)


def test_the_table_is_found_by_model_type() -> None:
    """Catches one of the two spellings that is not known, and an unknown type that is taken for GPT-2."""
    assert table_for({"model_type": "gpt2"}) is GPT2
    assert table_for({"model_type": "megatron_gpt2"}) is GPT2
    with pytest.raises(UnsupportedError, match=r"model_type 'llama' .*is not supported; known are gpt2, megatron_gpt2"):
        table_for({"model_type": "llama"})


def test_classes_are_found_under_both_names() -> None:
    """Catches a class that is offered under one name only, and a head that is dropped without a word."""
    for model_class in GPT2.classes:
        assert GPT2.model_class(model_class.stock) is GPT2.model_class(model_class.ours) is model_class
    assert GPT2.model_class(None).stock == "GPT2LMHeadModel"
    with pytest.raises(UnsupportedError, match="GPT2DoubleHeadsModel is not one of the gpt2 classes"):
        GPT2.model_class("GPT2DoubleHeadsModel")
