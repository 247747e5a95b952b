"""What a table says of an architecture, and what is read off it.

``gpt2.py`` and ``bert.py`` are the tables; here is what their fields mean. Pure: no torch, no transformers, no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

from hf_megatron.errors import PartitionError, UnsupportedError, shown
from hf_megatron.partition.spec import Replicated, Shape, Spec

Config = Mapping[str, Any]

# The stock library's names for the tanh form of gelu, which differ by 3e-7 at most, and for the exact one.
TANH_GELUS = ("gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_accurate")
ERF_GELUS = ("gelu", "gelu_python")

# All that the stock library knows.
ACTIVATIONS = (
    *TANH_GELUS,
    *ERF_GELUS,
    *("gelu_10", "gelu_python_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu"),
    *("relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu"),
)

# Beyond any model, so that a damaged configuration does not become a table of a billion rows.
_MAX_SIZE = 2**30
_MAX_SIZES = {"num_hidden_layers": 10_000, "num_attention_heads": 65_536, "num_labels": 2**24}


@dataclass(frozen=True, slots=True)
class Field:
    """Where config.json says something, and what holds if it does not: the stock configuration's default."""

    name: str
    default: Any
    alias: str = ""

    def read(self, config: Config) -> Any:
        """The value in a config.json."""
        return config.get(self.name, config.get(self.alias, self.default))


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One parameter, of every layer where the name has a ``*``."""

    name: str  # relative to the base model (h.*.attn.c_attn.weight); a head's to the model with the head
    sizes: tuple[str | int, ...]  # the dimensions: numbers, or names in Architecture.sizes
    spec: Spec  # how it is cut
    # Megatron-LM's name for it, as its versions of 2021 to 2023 have it, or None if it has no such parameter. A "+" is
    # the layer after this one, behind the last layer the final norm.
    megatron: str | None = None
    qkv: int | None = None  # which third of Megatron-LM's fused queries (0), keys (1) and values (2) it is
    is_transposed: bool = False  # whether it is a matrix stored [in, out]; Megatron-LM's are [out, in]

    @property
    def module(self) -> str:
        """The module the parameter belongs to."""
        return self.name.rpartition(".")[0]


def weight_and_bias(
    module: str,
    megatron: str | None,
    sizes: tuple[str | int, ...],
    weight: Spec,
    bias: Spec | None = Replicated(),  # noqa: B008 (immutable)
    *,
    qkv: int | None = None,
    is_transposed: bool = False,
) -> tuple[TensorRule, ...]:
    """A module's weight, of shape ``sizes``, and unless ``bias`` is None its bias, one entry per output."""
    names = [f"{megatron}.{kind}" if megatron else None for kind in ("weight", "bias")]
    rule = TensorRule(f"{module}.weight", sizes, weight, names[0], qkv, is_transposed)
    if bias is None:
        return (rule,)
    return rule, TensorRule(f"{module}.bias", sizes[-1:] if is_transposed else sizes[:1], bias, names[1], qkv)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a concrete model: its full shape and its cut."""

    name: str
    shape: Shape
    spec: Spec


@dataclass(frozen=True, slots=True)
class ModelClass:
    """A model class with its head."""

    stock: str  # name in transformers
    ours: str  # name in this package
    head: tuple[TensorRule, ...] = ()
    has_prefix: bool = True  # whether the base model's parameters carry the base prefix
    # Of a language model: parameters of the head that are another one, the base model's without prefix, when
    # tie_word_embeddings is set.
    tied: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # parameters of the base model that this class does not have (a pooler)

    @property
    def is_language_model(self) -> bool:
        """Whether it projects onto the vocabulary."""
        return bool(self.tied)


@dataclass(frozen=True, slots=True)
class MegatronLM:
    """What Megatron-LM's model of an architecture is, beyond its parameters."""

    only: tuple[str, ...]  # how the names begin that tell its checkpoints from those of Megatron-LM's other models
    tokenizer: str  # the usual tokenizer_type
    required: Config  # fields of config.json with the only value that Megatron-LM's model can have
    ties_head: bool = False  # whether the head is the word embedding whatever is stored, except in Megatron-core
    # An epsilon that transformers writes into config.json unasked, and that loses against the checkpoint's own.
    unchosen_epsilon: float | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that is particular to one architecture."""

    name: str  # the same for both placements of BERT's norms
    model_type: str  # ours, in config.json
    stock_model_type: str
    own_config: Config = field(default_factory=dict)  # fields that only ours has, with the values this table is for
    config_class: str  # ours
    base_prefix: str  # of the base model's parameters in a model with a head, without the dot
    is_causal: bool  # whether a position sees earlier ones only; if not, the language model predicts masked words
    norms: Literal["pre", "post"]  # whether LayerNorms stand before attention and MLP or after them
    # Where config.json has vocab_size, num_positions, hidden_size, num_hidden_layers, num_attention_heads,
    # intermediate_size (a default of None is four times the hidden size) and, where there are any, num_token_types.
    size_fields: Mapping[str, Field]
    unused_positions: int = 0  # rows of the position embedding that no token gets
    activation: Field  # in the layers
    head_activation: str | None = None  # our field for the one in the masked-LM head, where that may be another
    epsilon: Field  # of the norms
    dropouts: tuple[Field, Field, Field]  # of the embeddings, of the attention, of what is added to the residual
    functional: tuple[str, ...] = ()  # further fields that change what is computed and that no tensor shows
    required: Mapping[str, tuple[object, str]]  # fields with the only value that is supported, and why
    body: tuple[TensorRule, ...]  # the base model's parameters
    classes: tuple[ModelClass, ...]  # the first one is assumed where config.json names none
    word_embedding: str  # its name in body
    obsolete: tuple[str, ...]  # patterns of tensors that old checkpoints carry and the models have no more
    megatron: MegatronLM | None  # None if Megatron-LM has no such model

    def is_for(self, config: Config) -> bool:
        """Whether this is the table of a config.json, ours or the stock one."""
        model_type = config.get("model_type")
        if model_type == self.model_type:
            return all(config.get(name) == value for name, value in self.own_config.items())
        return bool(model_type == self.stock_model_type)

    def config_of(self, config: Config, model_class: ModelClass, *, stock: bool) -> dict[str, Any]:
        """A config.json that names the stock classes, or ours; what both have in common stays as it is."""
        result = {name: value for name, value in config.items() if name not in self.own_config}
        if not stock:
            result |= self.own_config
        result["model_type"] = self.stock_model_type if stock else self.model_type
        result["architectures"] = [model_class.stock if stock else model_class.ours]
        return result

    def sizes(self, config: Config) -> dict[str, int]:
        """The numbers behind the names in ``TensorRule.sizes``: those of ``size_fields`` and some that follow.

        UnsupportedError if the models of this package cannot honour the configuration.
        """
        sizes: dict[str, int] = {}
        for name, where in self.size_fields.items():
            value = where.read(config)
            if (other := config.get(where.alias, value)) != value:
                raise UnsupportedError(
                    f"The configuration has both {where.name}={shown(value)} and {where.alias}={shown(other)}, which "
                    "are the same; remove the one that is wrong."
                )
            if value is None and where.default is None:
                value = 4 * sizes["hidden_size"]
            if type(value) is not int or value < 1:
                raise UnsupportedError(f"{where.name}={shown(value)} in the configuration is not a positive integer.")
            largest = _MAX_SIZES.get(name, _MAX_SIZE)
            if value > largest:
                message = f"{where.name}={value} in the configuration is more than {largest}, a damaged number?"
                raise UnsupportedError(message)
            sizes[name] = value
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        if hidden % heads:
            message = f"hidden_size={hidden} is not divisible by num_attention_heads={heads}"
            raise UnsupportedError(f"{message}; every head must have the same size.")
        for name, (only, reason) in self.required.items():
            if (value := config.get(name)) not in (None, only):
                raise UnsupportedError(f"{name}={shown(value)} is not supported: {reason}.")
        max_length = sizes["num_positions"] - self.unused_positions
        labels = _number_of_labels(config)
        return {**sizes, "query_key_value": 3 * hidden, "max_length": max_length, "num_labels": labels}

    def check_numerics(self, config: Config) -> None:
        """Refuse a configuration with which the stock library could not run the model, or would compute nonsense.

        Raises:
            UnsupportedError: An unknown activation, an epsilon or a dropout out of range, or quantization.
        """
        problems = [
            f"{name}={shown(value)} (known are {', '.join(ACTIVATIONS)})"
            for name, value in zip((self.activation.name, self.head_activation), self.activations(config), strict=True)
            if not isinstance(value, str) or value not in ACTIVATIONS
        ]
        epsilon = self.epsilon.read(config)
        if not _is_number(epsilon) or epsilon <= 0:
            problems.append(f"{self.epsilon.name}={shown(epsilon)} (a number above 0)")
        for name, rate in {where.name: where.read(config) for where in self.dropouts}.items():
            # null is what some tools write for no dropout.
            if rate is not None and (not _is_number(rate) or not 0 <= rate < 1):
                problems.append(f"{name}={shown(rate)} (a number from 0 to below 1)")
        scale = config.get("initializer_range")
        if scale is not None and (not _is_number(scale) or scale < 0):
            problems.append(f"initializer_range={shown(scale)} (a number of 0 or more)")
        if config.get("quantization_config") is not None:
            problems.append("quantization_config (only weights that are not quantized)")
        if (elsewhere := config.get("transformers_weights")) is not None:
            problems.append(f"transformers_weights={shown(elsewhere)} (weights under the usual names)")
        if problems:
            raise UnsupportedError(f"The configuration is not that of a model that runs: {'; '.join(problems)}.")

    def activations(self, config: Config) -> tuple[Any, Any]:
        """Names of the activation in the layers and of the one in the masked-LM head."""
        in_layers = self.activation.read(config)
        return in_layers, (config.get(self.head_activation) if self.head_activation else None) or in_layers

    def stock_mismatch(self, config: Config) -> str | None:
        """Say in a sentence what the stock class computes differently under a configuration, or None."""
        in_layers, in_head = self.activations(config)
        if is_same_function(in_layers, in_head):
            return None
        size = " (up to 4.7e-4 in each activation, about 1e-3 in the logits)" if "gelu" in str(in_layers) else ""
        return (
            f"The stock class has one activation, {self.activation.name}={in_layers!r}, and applies it in the "
            f"masked-LM head too, where this model has {in_head!r}{size}."
        )

    def model_class(self, name: str | None) -> ModelClass:
        """The class of this name, stock or ours, or UnsupportedError; the first class if ``name`` is None."""
        if name is None:
            return self.classes[0]
        for model_class in self.classes:
            if name in (model_class.stock, model_class.ours):
                return model_class
        known = ", ".join(model_class.stock for model_class in self.classes)
        raise UnsupportedError(f"{shown(name)} is not one of the {self.name} classes offered here: {known}.")

    def class_of(self, config: Config) -> ModelClass:
        """The class that a config.json names, or the first one; UnsupportedError if there is no such class here."""
        named = config.get("architectures") or [None]
        if not isinstance(named, list):
            raise UnsupportedError(f"architectures={shown(named)} in the configuration is no list of class names.")
        return self.model_class(named[0])

    def tensors(self, config: Config, model_class: ModelClass) -> dict[str, Tensor]:
        """Every tensor in the state dict of ``model_class`` under ``config``, by name, rule by rule."""
        sizes = self.sizes(config)
        prefix = f"{self.base_prefix}." if model_class.has_prefix else ""
        tied = model_class.tied if config.get("tie_word_embeddings", True) else {}
        rules = [(prefix + rule.name, rule) for rule in self.body if rule.name not in model_class.without]
        rules += [(rule.name, rule) for rule in model_class.head if rule.name not in tied]
        return {tensor.name: tensor for name, rule in rules for tensor in _instances(name, rule, sizes)}

    def check_degree(self, config: Config, tp_size: int) -> None:
        """Raise PartitionError if a model of this configuration cannot be cut over ``tp_size`` ranks."""
        if tp_size < 1:
            raise PartitionError(f"tp_size={tp_size} is not a degree; choose 1 or more.")
        heads = self.sizes(config)["num_attention_heads"]
        if tp_size > heads:
            raise PartitionError(
                f"num_attention_heads={heads} is less than tp_size={tp_size}: some ranks would have no head; "
                f"choose {heads} or less."
            )
        one_layer = {**config, self.size_fields["num_hidden_layers"].name: 1}  # what fits one fits all
        for tensor in self.tensors(one_layer, self.classes[0]).values():
            tensor.spec.check(tensor.name, tensor.shape, tp_size)

    @cached_property
    def rules(self) -> tuple[TensorRule, ...]:
        """All rules: the body's, then each head's once."""
        heads = {rule.name: rule for model_class in self.classes for rule in model_class.head}
        return self.body + tuple(heads.values())

    def module_specs(self, module: str) -> dict[str, Spec]:
        """Cuts of one module's parameters: ``module_specs("h.*.attn.c_attn") -> {"weight": ..., "bias": ...}``."""
        specs = {rule.name.rpartition(".")[2]: rule.spec for rule in self.rules if rule.module == module}
        assert specs, f"{module} is not in the {self.name} table"
        return specs

    def rule_of(self, name: str) -> TensorRule:
        """The rule of a concrete parameter name, with or without the base prefix; PartitionError if there is none."""
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        for rule in self.rules:
            if rule.name in (pattern, pattern.removeprefix(f"{self.base_prefix}.")):
                return rule
        raise PartitionError(f"{name} is not a parameter of the {self.name} table.")

    def spec_of(self, name: str) -> Spec:
        """The cut of a concrete parameter name, as :meth:`rule_of` finds it."""
        return self.rule_of(name).spec

    def is_obsolete(self, name: str) -> bool:
        """Whether ``name``, with or without the base prefix, is a buffer that old checkpoints carry for nothing."""
        relative = name.removeprefix(f"{self.base_prefix}.")
        return any(fnmatchcase(relative, pattern) for pattern in self.obsolete)


def is_same_function(a: object, b: object) -> bool:
    """Whether two activations are equal but for their names."""
    return a == b or any(a in family and b in family for family in (TANH_GELUS, ERF_GELUS))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _number_of_labels(config: Config) -> int:
    """``num_labels``, which config.json may say in words (``id2label``) or not at all."""
    labels, names = config.get("num_labels"), config.get("id2label")
    if labels is None:
        return len(names) if isinstance(names, Mapping) else 2
    if type(labels) is not int or not 0 < labels <= _MAX_SIZES["num_labels"]:
        raise UnsupportedError(f"num_labels={shown(labels)} in the configuration is not a number of labels.")
    return labels


def _instances(name: str, rule: TensorRule, sizes: Mapping[str, int]) -> Iterator[Tensor]:
    shape = tuple(sizes[size] if isinstance(size, str) else size for size in rule.sizes)
    if "*" not in name:
        yield Tensor(name, shape, rule.spec)
        return
    for layer in range(sizes["num_hidden_layers"]):
        yield Tensor(name.replace("*", str(layer), 1), shape, rule.spec)
