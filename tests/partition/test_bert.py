"""The BERT tables, one for each placement of the LayerNorms, against the stock models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, MegatronBertConfig

from hf_megatron.architectures import BERT_POST, BERT_PRE, Architecture, table_for
from hf_megatron.errors import PartitionError, UnsupportedError
from hf_megatron.partition import Replicated, Split, VocabSplit

STOCK_CONFIG: dict[str, Any] = {"bert": BertConfig, "megatron-bert": MegatronBertConfig}
PLACEMENTS = [pytest.param(BERT_PRE, id="pre"), pytest.param(BERT_POST, id="post")]


def _stock_shapes(table: Architecture, stock_class: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the stock model saves, what is tied left out; nothing is allocated."""
    with torch.device("meta"):
        model = getattr(transformers, stock_class)(config)
    tied = table.model_class(stock_class).tied if config.tie_word_embeddings else {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _table_shapes(table: Architecture, stock_class: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    tensors = table.tensors(config, table.model_class(stock_class))
    for name, tensor in tensors.items():
        assert table.spec_of(name) == tensor.spec
        assert not table.is_obsolete(name)
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("table", PLACEMENTS)
def test_defaults_are_the_stock_ones(table: Architecture) -> None:
    """Catches a config.json that leaves out a size and is read as another model than transformers reads."""
    stock_class, stock_config = table.classes[0].stock, STOCK_CONFIG[table.stock_model_type]()
    assert _table_shapes(table, stock_class, {}) == _stock_shapes(table, stock_class, stock_config)


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("index", range(len(BERT_PRE.classes)), ids=[c.ours for c in BERT_PRE.classes])
@pytest.mark.parametrize("table", PLACEMENTS)
def test_tensors_of_every_class(table: Architecture, index: int, is_tied: bool) -> None:
    """Catches a head, a pooler or a prefix that differs from the stock class, and tied tensors listed twice."""
    stock_class = table.classes[index].stock
    config = STOCK_CONFIG[table.stock_model_type](
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=100,
        vocab_size=131,
        num_labels=5,
        tie_word_embeddings=is_tied,
    )
    assert _table_shapes(table, stock_class, config.to_dict()) == _stock_shapes(table, stock_class, config)


@pytest.mark.parametrize("table", PLACEMENTS)
def test_cuts_are_the_papers(table: Architecture) -> None:
    """Catches a cut along the wrong dimension of BERT's [out, in] weights, and a bias that is not cut like its rows."""
    cut = {rule.name: rule.spec for rule in table.rules if rule.spec != Replicated()}
    columns = ["attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"]
    decoder = "cls.predictions"
    assert cut == {
        "embeddings.word_embeddings.weight": VocabSplit(),
        **{f"encoder.layer.*.{name}.{kind}": Split(0) for name in columns for kind in ("weight", "bias")},
        "encoder.layer.*.attention.output.dense.weight": Split(1),
        "encoder.layer.*.output.dense.weight": Split(1),
        f"{decoder}.bias": VocabSplit(),
        f"{decoder}.decoder.weight": VocabSplit(),
        f"{decoder}.decoder.bias": VocabSplit(),
    }


def test_the_table_is_found_by_type_and_placement() -> None:
    """Catches one placement taken for the other, whose tensors have other names and whose function differs."""
    assert table_for({"model_type": "bert"}) is BERT_POST
    assert table_for({"model_type": "megatron-bert"}) is BERT_PRE
    assert table_for({"model_type": "megatron_bert", "layernorm_placement": "post"}) is BERT_POST
    assert table_for({"model_type": "megatron_bert", "layernorm_placement": "pre"}) is BERT_PRE
    with pytest.raises(UnsupportedError, match=r"'layernorm_placement': 'sandwich'"):
        table_for({"model_type": "megatron_bert", "layernorm_placement": "sandwich"})


@pytest.mark.parametrize("table", PLACEMENTS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        ({"hidden_size": 100, "num_attention_heads": 12}, "hidden_size=100 is not divisible by num_attention_heads=12"),
    ],
)
def test_configurations_that_cannot_be_honoured_are_refused(
    table: Architecture, config: dict[str, object], message: str
) -> None:
    """Catches a model that is built, and computes something else than the configuration says."""
    with pytest.raises(UnsupportedError, match=message):
        table.sizes(config)


def test_heads_that_do_not_divide_are_refused_with_the_degrees_that_fit() -> None:
    """Catches a check that is GPT-2's alone."""
    with pytest.raises(
        PartitionError, match=r"num_attention_heads=12 is not divisible by tp_size=5; choose 1, 2, 3, 4"
    ):
        BERT_POST.check_degree({}, 5)
    BERT_PRE.check_degree({}, 8)
