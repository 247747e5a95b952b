"""What the planner needs to know of a model: its sizes, and what its layers keep and compute.

Pure: a config.json in, numbers out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import cast

from hf_megatron.architectures import ModelClass, PartitionTable, table_for
from hf_megatron.errors import CheckpointFormatError, UnsupportedError

# Activation functions that are one kernel in these models, and whether their backward pass needs the input. If it needs
# the output instead, that is the next product's input, and kept in any case.
_KEEPS_INPUT = {
    "gelu": True,
    "gelu_new": True,
    "gelu_pytorch_tanh": True,
    "relu": False,
    "silu": True,
    "swish": True,
    "tanh": False,
}
# Of the embedding, in attention, and of what is added to the residual stream.
_GPT2_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout_prob")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model, as far as memory and time go.

    Attributes:
        config: Its config.json.
        table: How its architecture is cut.
        model_class: Its class.
        num_layers: L.
        hidden_size: H.
        num_heads: Attention heads over all ranks.
        intermediate_size: Width of the MLP's inner layer.
        vocab_size: V.
        num_positions: Longest sequence.
        keeps_activation_input: Whether the activation function's backward pass needs its input.
        embedding_dropout: Probability.
        attention_dropout: Probability.
        residual_dropout: Probability.
    """

    config: Mapping[str, object]
    table: PartitionTable
    model_class: ModelClass
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    num_positions: int
    keeps_activation_input: bool
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float

    @property
    def is_causal(self) -> bool:
        """Whether a position sees earlier ones only: GPT-2 and not BERT."""
        return self.table.architecture == "gpt2"

    @property
    def is_post(self) -> bool:
        """Whether LayerNorms stand after attention and MLP."""
        return self.table.own_config.get("layernorm_placement") == "post"

    @property
    def has_vocabulary_head(self) -> bool:
        """Whether the class projects onto the vocabulary. The heads of other classes are small, and not counted."""
        return bool(self.model_class.tied)

    @property
    def has_pooler(self) -> bool:
        """Whether there is a pooler on the first token, as in most classes of BERT."""
        return any(rule.module == "pooler.dense" for rule in self.table.body) and not self.model_class.without

    def layer_matrices(self, tp_size: int) -> int:
        """Elements of one layer's matrices on one rank: [H, 3H], [H, H], [H, F] and [F, H], each cut over the ranks."""
        return 4 * self.hidden_size**2 // tp_size + 2 * self.hidden_size * ceil(self.intermediate_size / tp_size)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> ModelShape:
        """The shape of the model that a config.json describes, ours or the stock one.

        Raises:
            UnsupportedError: A model that this package does not have, or an activation whose cost is not known here.
            CheckpointFormatError: A dropout probability is no number from 0 to 1.
        """
        table = table_for(config)
        sizes = table.sizes(config)
        is_gpt2 = table.architecture == "gpt2"
        architectures = cast("list[str] | None", config.get("architectures"))
        field, default = ("activation_function", "gelu_new") if is_gpt2 else ("hidden_act", "gelu")
        name = str(config.get(field, default))
        if name not in _KEEPS_INPUT:
            raise UnsupportedError(
                f"The cost of activation {name!r} is not known; known are {', '.join(_KEEPS_INPUT)}."
            )
        dropouts = _GPT2_DROPOUTS if is_gpt2 else _BERT_DROPOUTS
        embedding, attention, residual = (_probability(config, name) for name in dropouts)
        return cls(
            config=config,
            table=table,
            model_class=table.model_class(architectures[0] if architectures else None),
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            vocab_size=sizes["vocab_size"],
            num_positions=sizes["num_positions" if is_gpt2 else "max_position_embeddings"],
            keeps_activation_input=_KEEPS_INPUT[name],
            embedding_dropout=embedding,
            attention_dropout=attention,
            residual_dropout=residual,
        )


def _probability(config: Mapping[str, object], name: str) -> float:
    value = config.get(name, 0.1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise CheckpointFormatError(f"{name} in config.json is {value!r}; it should be a number from 0 to 1.")
    return float(value)
