"""The paper's models by name: their sizes, and the model classes built from them."""

import pytest
import torch

from hf_megatron import MegatronBertConfig, MegatronGPT2Config
from hf_megatron.architectures.presets import PRESETS, preset_named
from hf_megatron.errors import UnsupportedError
from hf_megatron.planning import ModelShape
from hf_megatron.planning.memory import local_numel
from tests.models.architectures import GPT2, PRE

# Layers, hidden size and heads, of tables 1, 2 and 4 of the paper; millions of parameters.
_PAPER = {
    "gpt2-355m": (24, 1024, 16, 354.8),
    "gpt2-1.2b": (40, 1536, 16, 1212.0),
    "gpt2-2.5b": (54, 1920, 20, 2488.6),
    "gpt2-4.2b": (64, 2304, 24, 4196.9),
    "gpt2-8.3b": (72, 3072, 24, 8314.1),
    "gpt2-8.3b-32heads": (72, 3072, 32, 8314.1),
    "bert-336m": (24, 1024, 16, 336.2),
    "bert-1.3b": (24, 2048, 32, 1280.6),
    "bert-3.9b": (48, 2560, 40, 3869.1),
}


def test_sizes_are_the_paper_s() -> None:
    """Catches another size, or the heads of the other table: the evaluated 8.3B has 24, the scaling study's 32."""
    shapes = {name: ModelShape.from_config(p.config) for name, p in PRESETS.items() if p.is_of_paper}
    assert {
        name: (s.num_layers, s.hidden_size, s.num_heads, round(local_numel(s, 1)[0] / 1e6, 1))
        for name, s in shapes.items()
    } == _PAPER
    assert {s.hidden_size // s.num_heads for name, s in shapes.items() if name.startswith("bert")} == {64}


def test_published_sizes() -> None:
    """Catches a preset that is not the published model: parameters without the head, in millions."""
    published = {"gpt2": 124.4, "gpt2-medium": 354.8, "gpt2-large": 774.0, "gpt2-xl": 1557.6}
    published |= {"bert-base-uncased": 110.1, "bert-large-uncased": 336.2, "bert-base-cased": 108.9}
    published |= {"bert-large-cased": 334.7}
    assert published == {
        name: round(local_numel(ModelShape.from_config(p.config), 1)[0] / 1e6, 1)
        for name, p in PRESETS.items()
        if not p.is_of_paper
    }


@pytest.mark.parametrize("name", PRESETS)
def test_models_have_as_many_parameters_as_planned(name: str) -> None:
    """Catches a preset, a table or a model class that disagree; 8.3B and 3.9B among them, on the meta device."""
    case = GPT2 if name.startswith("gpt2") else PRE
    with torch.device("meta"):
        model = case.build(config=type(case.config()).from_preset(name))
    assert model.num_parameters() == local_numel(ModelShape.from_config(PRESETS[name].config), 1)[0]


def test_what_is_asked_for_differently() -> None:
    """Catches changes that are dropped, under either spelling, and values that the presets do not pass on."""
    config = MegatronGPT2Config.from_preset("GPT2-8.3B", num_attention_heads=16, vocab_size=51200)
    assert (config.n_head, config.vocab_size, config.n_embd, config.model_type) == (16, 51200, 3072, "megatron_gpt2")
    bert = MegatronBertConfig.from_preset("bert-3.9b", layernorm_placement="post")
    assert (bert.layernorm_placement, bert.vocab_size, bert.layer_norm_eps) == ("post", 30522, 1e-5)
    assert MegatronBertConfig.from_preset("bert-3.9b").layernorm_placement == "pre"


def test_unknown_presets_are_refused_with_the_known_ones() -> None:
    """Catches a message that leaves one guessing, and a GPT-2 configuration with BERT's sizes."""
    with pytest.raises(UnsupportedError, match=r"no preset 'gpt3'.*gpt2-8\.3b.*bert-3\.9b"):
        preset_named("gpt3")
    with pytest.raises(UnsupportedError, match=r"no preset 'bert-336m'; choose one of gpt2-355m, (?!.*bert-)"):
        MegatronGPT2Config.from_preset("bert-336m")
    with pytest.raises(UnsupportedError, match="choose one of bert-336m"):
        MegatronBertConfig.from_preset("gpt2-355m")
