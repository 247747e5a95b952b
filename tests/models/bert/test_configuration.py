"""The configuration: what it takes from stock ones, gives back to them, and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig
from transformers import MegatronBertConfig as StockMegatronBertConfig

from hf_megatron import MegatronBertConfig
from hf_megatron.errors import UnsupportedError
from tests.models.architectures import BERTS, ModelCase

# What either kind may say beyond its sizes.
OTHER = {
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.3,
    "attention_probs_dropout_prob": 0.4,
    "layer_norm_eps": 0.5,
    "initializer_range": 0.6,
    "type_vocab_size": 7,
    "pad_token_id": 8,
    "tie_word_embeddings": False,
    "id2label": {0: "a", 1: "b", 2: "c"},
    "chunk_size_feed_forward": 2,
}
REFUSED: dict[str, dict[str, Any]] = {
    "is_decoder=True": {"is_decoder": True},
    "add_cross_attention=True": {"add_cross_attention": True},
    "position_embedding_type='relative_key'": {"position_embedding_type": "relative_key"},
    "position_embedding_type='relative_key_query'": {"position_embedding_type": "relative_key_query"},
    "hidden_size=50 is not divisible by num_attention_heads=12": {"hidden_size": 50},
}


@pytest.mark.parametrize(
    "changes", [{}, BERTS[0].changes(), BERTS[0].changes(**OTHER)], ids=["defaults", "sizes", "everything"]
)
@pytest.mark.parametrize("case", BERTS)
def test_a_stock_configuration_is_read_and_given_back(tmp_path: Path, case: ModelCase, changes: dict[str, Any]) -> None:
    """Catches an entry that is lost, or that is written only where it differs from this package's default."""
    stock, placement = case.stock().config_class(**changes), case.table.own_config["layernorm_placement"]
    stock.save_pretrained(tmp_path / "stock")
    ours = MegatronBertConfig.from_pretrained(tmp_path / "stock")
    assert ours.layernorm_placement == placement
    assert ours.model_type == "megatron_bert"
    for name, value in stock.to_dict().items():
        if name not in ("model_type", "transformers_version"):
            assert getattr(ours, name) == getattr(stock, name), f"{name}={value}"

    ours.save_pretrained(tmp_path / "ours")
    assert MegatronBertConfig.from_pretrained(tmp_path / "ours").to_dict() == ours.to_dict()
    table, written = case.table, json.loads((tmp_path / "ours/config.json").read_text())
    assert written["layernorm_placement"] == placement
    given_back = table.config_of(written, table.classes[0], stock=True)
    (tmp_path / "ours/config.json").write_text(json.dumps(given_back))
    again = type(stock).from_pretrained(tmp_path / "ours")
    for name, value in stock.to_dict().items():
        if name not in ("architectures", "transformers_version"):
            assert getattr(again, name) == getattr(stock, name), f"{name}={value}"


@pytest.mark.parametrize(("case", "other"), [(BERTS[0], BertConfig()), (BERTS[1], StockMegatronBertConfig())])
def test_sizes_that_are_the_other_kinds_defaults_are_written(tmp_path: Path, case: ModelCase, other: Any) -> None:
    """Catches sizes left out of config.json because some class has them by default, and read as another's."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = {name: getattr(other, name) for name in names}
    case.stock_config(**sizes).save_pretrained(tmp_path / "stock")
    MegatronBertConfig.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert {name: written[name] for name in names} == sizes


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("case", BERTS)
def test_what_cannot_be_honoured_is_refused_when_it_is_read(tmp_path: Path, case: ModelCase, message: str) -> None:
    """Catches a model that is built and computes something else; the weights are not even looked at."""
    with pytest.raises(UnsupportedError, match=message):
        case.config(**REFUSED[message])
    case.save_stock(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **REFUSED[message]}))
    (tmp_path / "model.safetensors").write_text("not a weight file")
    for make in (MegatronBertConfig.from_pretrained, case.ours().from_pretrained):
        with pytest.raises(UnsupportedError, match=message):
            make(tmp_path)


def test_another_placement_is_refused() -> None:
    """Catches a misspelt placement that is taken for one of the two, and another default than the paper's."""
    assert MegatronBertConfig().layernorm_placement == "pre"
    with pytest.raises(UnsupportedError, match=r"layernorm_placement='Post'; choose 'pre' .* or 'post'"):
        BERTS[0].config(layernorm_placement="Post")


def test_sizes_that_are_left_out_are_those_of_the_stock_class(tmp_path: Path) -> None:
    """Catches a stock config.json completed with the other kind's sizes, or with this package's."""
    for model_type, hidden_size, placement in (("bert", 768, "post"), ("megatron-bert", 1024, "pre")):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}", "num_attention_heads": 4}}')
        config = MegatronBertConfig.from_pretrained(tmp_path)
        assert (config.hidden_size, config.layernorm_placement) == (hidden_size, placement)
        assert config.num_attention_heads == 4
