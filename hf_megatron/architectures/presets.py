"""The paper's models, by name, as the config.json each of them has. Pure: no model, no torch.

Two tables of the paper say "8.3B": the model that was trained and evaluated has 24 heads of 128, the one of the scaling
study 32 heads of 96. All others that stand in both tables are the same.

Source: Shoeybi et al. 2019, arXiv:1909.08053v4, tables 1 (scaling study), 2 (GPT-2) and 4 (BERT), sections 4.2 and 5.3
(vocabulary, positions, dropout); activation and epsilon: Megatron-LM's code of 2019 and 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_megatron.architectures import BERT_PRE, GPT2, Architecture, ModelClass
from hf_megatron.errors import UnsupportedError


@dataclass(frozen=True)
class Preset:
    """One of the paper's models.

    Attributes:
        name: What to call it by.
        table: How its architecture is cut.
        sizes: What its configuration says beyond the architecture.
    """

    name: str
    table: Architecture
    sizes: Mapping[str, object]

    @property
    def model_class(self) -> ModelClass:
        """The class it was trained as: with the language-modeling head, BERT with both pretraining heads."""
        return self.table.classes[0]

    @property
    def config(self) -> dict[str, object]:
        """Its config.json, under our ``model_type``."""
        return self.table.config_of(self.sizes, self.model_class, stock=False)


def _preset(
    name: str, table: Architecture, layers: int, hidden: int, heads: int, positions: int, **special: object
) -> Preset:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_positions": positions,
    }
    if table.size_fields["intermediate_size"].default is not None:
        sizes["intermediate_size"] = 4 * hidden
    named = {table.size_fields[size].name: value for size, value in sizes.items()}
    dropouts = {where.name: 0.1 for where in table.dropouts}
    numerics = {table.activation.name: table.activation.default, table.epsilon.name: 1e-5, "initializer_range": 0.02}
    return Preset(name, table, {**named, **dropouts, **numerics, **special})


def _gpt2(name: str, *, layers: int, hidden: int, heads: int) -> Preset:
    special = {"vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256}
    return _preset(name, GPT2, layers, hidden, heads, 1024, **special)


def _bert(name: str, *, layers: int, hidden: int, heads: int) -> Preset:
    special = {"vocab_size": 30522, "type_vocab_size": 2, "pad_token_id": 0}
    return _preset(name, BERT_PRE, layers, hidden, heads, 512, **special)


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        _gpt2("gpt2-355m", layers=24, hidden=1024, heads=16),
        _gpt2("gpt2-1.2b", layers=40, hidden=1536, heads=16),
        _gpt2("gpt2-2.5b", layers=54, hidden=1920, heads=20),
        _gpt2("gpt2-4.2b", layers=64, hidden=2304, heads=24),
        _gpt2("gpt2-8.3b", layers=72, hidden=3072, heads=24),
        _gpt2("gpt2-8.3b-32heads", layers=72, hidden=3072, heads=32),
        _bert("bert-336m", layers=24, hidden=1024, heads=16),
        _bert("bert-1.3b", layers=24, hidden=2048, heads=32),
        _bert("bert-3.9b", layers=48, hidden=2560, heads=40),
    )
}


def preset_named(name: str, *, architecture: str | None = None) -> Preset:
    """A preset by its name.

    Args:
        name: ``gpt2-8.3b`` or the like; capital letters do not matter.
        architecture: ``gpt2`` or ``bert`` if it has to be one of these.

    Raises:
        UnsupportedError: There is none of this name; the message lists those there are.
    """
    known = {n: p for n, p in PRESETS.items() if architecture in (None, p.table.name)}
    if name.lower() not in known:
        raise UnsupportedError(f"There is no preset {name!r}; choose one of {', '.join(known)}.")
    return known[name.lower()]
