"""What the planner needs to know of a model. Pure: a config.json in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from hf_megatron.architectures import Architecture, ModelClass, Tensor, table_for
from hf_megatron.errors import UnsupportedError

# Activation functions that are one kernel in these models, and whether their backward pass needs the input. If it needs
# the output instead, that is the next product's input, and kept in any case.
_KEEPS_INPUT = dict.fromkeys(("gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish"), True)
_KEEPS_INPUT |= dict.fromkeys(("relu", "tanh"), False)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model, as far as memory and time go."""

    config: Mapping[str, Any]  # its config.json
    table: Architecture
    model_class: ModelClass
    num_layers: int  # L
    hidden_size: int  # H
    num_heads: int  # over all ranks
    intermediate_size: int  # F, the width of the MLP's inner layer
    vocab_size: int  # V
    num_positions: int  # of the longest sequence
    keeps_activation_input: bool  # whether the activation function's backward pass needs its input
    embedding_dropout: float  # probability, as the next two
    attention_dropout: float
    residual_dropout: float

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All parameters, by name."""
        return self.table.tensors(self.config, self.model_class)

    @cached_property
    def layer(self) -> list[Tensor]:
        """The parameters of one layer."""
        return [tensor for name, tensor in self.tensors.items() if ".0." in name]

    def layer_matrices(self, tp_size: int) -> int:
        """Elements of one layer's matrices on one rank."""
        return sum(prod(t.spec.shard_shape(t.shape, tp_size, 0)) for t in self.layer if len(t.shape) == 2)

    def head_has(self, *sizes: str) -> bool:
        """Whether the class's head has a parameter of these sizes."""
        return any(rule.sizes == sizes for rule in self.model_class.head)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape of the model that a config.json describes, ours or the stock one.

        Raises:
            UnsupportedError: A model that this package does not have or that does not run, or an activation whose cost
                is not known here.
        """
        table = table_for(config)
        sizes, activation = table.sizes(config), str(table.activation.read(config))
        if activation not in _KEEPS_INPUT:
            known = ", ".join(_KEEPS_INPUT)
            raise UnsupportedError(f"The cost of activation {activation!r} is not known; known are {known}.")
        table.check_numerics(config)
        embedding, attention, residual = (float(where.read(config) or 0) for where in table.dropouts)
        return cls(
            config=config,
            table=table,
            model_class=table.class_of(config),
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            vocab_size=sizes["vocab_size"],
            num_positions=sizes["max_length"],
            keeps_activation_input=_KEEPS_INPUT[activation],
            embedding_dropout=embedding,
            attention_dropout=attention,
            residual_dropout=residual,
        )
