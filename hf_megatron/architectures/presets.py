"""The paper's models, and the published GPT-2 and BERT, by name, as the config.json each of them has.

Pure: no model, no torch.

Two tables of the paper say "8.3B": the model that was trained and evaluated has 24 heads of 128, the one of the scaling
study 32 heads of 96. All others that stand in both tables are the same.

Source: Shoeybi et al. 2019, arXiv:1909.08053v4, tables 1 (scaling study), 2 (GPT-2) and 4 (BERT), sections 4.2 and 5.3
(vocabulary, positions, dropout); activation and epsilon: Megatron-LM's code of 2019 and 2020. The published ones: their
config.json on the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_megatron.architectures import BERT_POST, BERT_PRE, GPT2, Architecture
from hf_megatron.architectures.table import Config
from hf_megatron.errors import UnsupportedError


@dataclass(frozen=True)
class Preset:
    """A model: its name, its architecture, and what its config.json says beyond that."""

    name: str
    table: Architecture
    sizes: Config
    is_of_paper: bool

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
_PUBLISHED_GPT2 = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
_GPT2_GIVEN = {"vocab_size": 50257, "n_positions": 1024, "bos_token_id": 50256, "eos_token_id": 50256}
_BERT = {"bert-336m": (24, 1024, 16), "bert-1.3b": (24, 2048, 32), "bert-3.9b": (48, 2560, 40)}
_UNCASED = {"bert-base-uncased": (12, 768, 12), "bert-large-uncased": (24, 1024, 16)}
_CASED = {"bert-base-cased": (12, 768, 12), "bert-large-cased": (24, 1024, 16)}
_BERT_GIVEN = {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 0}


_UNCASED_GIVEN = {**_BERT_GIVEN, "layer_norm_eps": 1e-12}
_CASED_GIVEN = {**_UNCASED_GIVEN, "vocab_size": 28996}


def _preset(
    name: str, table: Architecture, given: Config, is_of_paper: bool, layers: int, hidden: int, heads: int
) -> Preset:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    if table.size_fields["intermediate_size"].default is not None:
        sizes["intermediate_size"] = 4 * hidden
    named = {table.size_fields[size].name: value for size, value in sizes.items()}
    dropouts = {where.name: 0.1 for where in table.dropouts}
    numerics = {table.activation.name: table.activation.default, table.epsilon.name: 1e-5, "initializer_range": 0.02}
    return Preset(name, table, {**named, **dropouts, **numerics, **given}, is_of_paper)


PRESETS: Mapping[str, Preset] = {
    name: _preset(name, table, given, is_of_paper, *sizes)
    for table, given, is_of_paper, models in (
        (GPT2, _GPT2_GIVEN, True, _GPT2),
        (BERT_PRE, _BERT_GIVEN, True, _BERT),
        (GPT2, _GPT2_GIVEN, False, _PUBLISHED_GPT2),
        (BERT_POST, _UNCASED_GIVEN, False, _UNCASED),
        (BERT_POST, _CASED_GIVEN, False, _CASED),
    )
    for name, sizes in models.items()
}


def preset_named(name: str, *, architecture: str | None = None) -> Preset:
    """A preset by its name in any case, of an architecture if it has to be of one; UnsupportedError lists all names."""
    known = {n: p for n, p in PRESETS.items() if architecture in (None, p.table.name)}
    if name.lower() not in known:
        raise UnsupportedError(f"There is no preset {name!r}; choose one of {', '.join(known)}.")
    return known[name.lower()]
