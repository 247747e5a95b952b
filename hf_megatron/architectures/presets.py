"""The paper's models, by name, as the config.json each of them has. Pure: no model, no torch.

Two tables of the paper say "8.3B": the model that was trained and evaluated has 24 heads of 128, the one of the scaling
study 32 heads of 96. All others that stand in both tables are the same.

Source: Shoeybi et al. 2019, arXiv:1909.08053v4, tables 1 (scaling study), 2 (GPT-2) and 4 (BERT), sections 4.2 and 5.3
(vocabulary, positions, dropout); activation and epsilon: Megatron-LM's code of 2019 and 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_megatron.architectures import BERT_PRE, GPT2, Architecture
from hf_megatron.architectures.table import Config
from hf_megatron.errors import UnsupportedError


@dataclass(frozen=True)
class Preset:
    """One of the paper's models: its name, its architecture, and what its config.json says beyond that."""

    name: str
    table: Architecture
    sizes: Config

    @property
    def config(self) -> dict[str, object]:
        """Its config.json, under our ``model_type``; BERT has both pretraining heads."""
        return self.table.config_of(self.sizes, self.table.classes[0], stock=False)


# Layers, hidden size, heads.
_GPT2 = {
    "gpt2-355m": (24, 1024, 16),
    "gpt2-1.2b": (40, 1536, 16),
    "gpt2-2.5b": (54, 1920, 20),
    "gpt2-4.2b": (64, 2304, 24),
    "gpt2-8.3b": (72, 3072, 24),
    "gpt2-8.3b-32heads": (72, 3072, 32),
}
_GPT2_GIVEN = {"vocab_size": 50257, "n_positions": 1024, "bos_token_id": 50256, "eos_token_id": 50256}
_BERT = {"bert-336m": (24, 1024, 16), "bert-1.3b": (24, 2048, 32), "bert-3.9b": (48, 2560, 40)}
_BERT_GIVEN = {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 0}


def _preset(name: str, table: Architecture, given: Config, layers: int, hidden: int, heads: int) -> Preset:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    if table.size_fields["intermediate_size"].default is not None:
        sizes["intermediate_size"] = 4 * hidden
    named = {table.size_fields[size].name: value for size, value in sizes.items()}
    dropouts = {where.name: 0.1 for where in table.dropouts}
    numerics = {table.activation.name: table.activation.default, table.epsilon.name: 1e-5, "initializer_range": 0.02}
    return Preset(name, table, {**named, **dropouts, **numerics, **given})


PRESETS: Mapping[str, Preset] = {
    name: _preset(name, table, given, *sizes)
    for table, given, models in ((GPT2, _GPT2_GIVEN, _GPT2), (BERT_PRE, _BERT_GIVEN, _BERT))
    for name, sizes in models.items()
}


def preset_named(name: str, *, architecture: str | None = None) -> Preset:
    """A preset by its name in any case, of an architecture if it has to be of one; UnsupportedError lists all names."""
    known = {n: p for n, p in PRESETS.items() if architecture in (None, p.table.name)}
    if name.lower() not in known:
        raise UnsupportedError(f"There is no preset {name!r}; choose one of {', '.join(known)}.")
    return known[name.lower()]
