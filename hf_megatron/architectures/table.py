"""What a table says of an architecture, and what is read off it.

``gpt2.py`` and ``bert.py`` are the tables; here is what their fields mean. Pure: no torch, no transformers, no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

from hf_megatron.errors import PartitionError, UnsupportedError
from hf_megatron.partition.spec import Replicated, Shape, Spec

Config = Mapping[str, Any]

TANH_GELUS = ("gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_accurate")
"""The stock library's names for the tanh form of gelu; they differ by 3e-7 at most."""
ERF_GELUS = ("gelu", "gelu_python")
"""And for the exact one."""

# Beyond any model, so that a damaged configuration does not become a table of a billion rows.
_MAX_LAYERS = 10_000
_MAX_SIZE = 2**30
_MAX_LISTED_DEGREE = 4096


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
    """One parameter, of every layer where the name has a ``*``.

    Attributes:
        name: Relative to the base model (``h.*.attn.c_attn.weight``); a head's relative to the model with the head.
        sizes: The dimensions: numbers, or names in :meth:`Architecture.sizes`.
        spec: How it is cut.
        megatron: Megatron-LM's name for it, as its versions of 2021 to 2023 have it; ``+`` is the layer after this one,
            behind the last layer the final norm. None if Megatron-LM has no such parameter.
        qkv: Which third of Megatron-LM's fused queries (0), keys (1) and values (2) it is; None if all or none of it.
        is_transposed: Whether it is a matrix stored [in, out]; Megatron-LM's are [out, in].
    """

    name: str
    sizes: tuple[str | int, ...]
    spec: Spec
    megatron: str | None = None
    qkv: int | None = None
    is_transposed: bool = False

    @property
    def module(self) -> str:
        """The module the parameter belongs to: everything before the last dot."""
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """The parameter's own name: everything after the last dot."""
        return self.name.rpartition(".")[2]


def weight_and_bias(
    module: str,
    sizes: tuple[str | int, ...],
    weight: Spec,
    bias: Spec | None = Replicated(),  # noqa: B008 (immutable)
    *,
    megatron: str | None = None,
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
    """A model class with its head.

    Attributes:
        stock: Its name in transformers.
        ours: Its name in this package.
        head: The head's parameters; empty for the base model.
        has_prefix: Whether the base model's parameters carry the base prefix.
        tied: Head parameters that are another tensor when ``tie_word_embeddings`` is set, with that tensor's name
            (the base model's without prefix).
        without: Parameters of the base model that this class does not have (a pooler).
    """

    stock: str
    ours: str
    head: tuple[TensorRule, ...] = ()
    has_prefix: bool = True
    tied: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    @property
    def is_language_model(self) -> bool:
        """Whether it projects onto the vocabulary."""
        return bool(self.tied)

    def has_megatron(self, name: str) -> bool:
        """Whether the head has a parameter of this name in Megatron-LM."""
        return any(rule.megatron == name for rule in self.head)


@dataclass(frozen=True, slots=True)
class MegatronLM:
    """What Megatron-LM's model of an architecture is, beyond its parameters.

    Attributes:
        only: How the names begin which tell its checkpoints from those of Megatron-LM's other models.
        tokenizer: The usual ``tokenizer_type``.
        required: Fields of config.json with the only value that Megatron-LM's model can have.
        ties_head: Whether the head is the word embedding whatever else is stored, except in Megatron-core.
        unchosen_epsilon: An epsilon in config.json that nobody has chosen, and that loses against the checkpoint's own.
    """

    only: tuple[str, ...]
    tokenizer: str
    required: Config
    ties_head: bool = False
    unchosen_epsilon: float | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that is particular to one architecture.

    Attributes:
        name: Short name (``gpt2``), the same for both placements of BERT's norms.
        model_type: Our ``model_type`` in config.json.
        stock_model_type: transformers' ``model_type``.
        own_config: Fields that our configuration has beyond the stock one, with the values this table is for.
        config_class: Our configuration class.
        base_prefix: Prefix of the base model's parameters in a model with a head, without the dot.
        is_causal: Whether a position sees earlier ones only. If not, the language model predicts masked words.
        norms: Whether LayerNorms stand before attention and MLP (``pre``) or after them (``post``).
        size_fields: Where config.json has each size: ``vocab_size``, ``num_positions``, ``hidden_size``,
            ``num_hidden_layers``, ``num_attention_heads``, ``intermediate_size`` (by default four times the hidden
            size if the default is None), and ``num_token_types`` where the model has them.
        activation: Field of the activation in the layers.
        head_activation: Name of our field for the one in the masked-LM head, where that may be another.
        epsilon: Field of the norms' epsilon.
        dropouts: Fields of the dropout of the embeddings, of the attention, and of what is added to the residual stream.
        functional: Further fields of config.json that change what is computed and that no tensor shows.
        required: Fields of config.json with the only value that is supported, and why.
        body: Parameters of the base model.
        classes: The model classes; the first one is assumed where config.json names none.
        word_embedding: Name of the word embedding in ``body``.
        obsolete: Patterns of tensors that old checkpoints carry and the models do not have any more.
        megatron: Megatron-LM's model; None if it has none.
    """

    name: str
    model_type: str
    stock_model_type: str
    own_config: Config = field(default_factory=dict)
    config_class: str
    base_prefix: str
    is_causal: bool
    norms: Literal["pre", "post"]
    size_fields: Mapping[str, Field]
    activation: Field
    head_activation: str | None = None
    epsilon: Field
    dropouts: tuple[Field, Field, Field]
    functional: tuple[str, ...] = ()
    required: Mapping[str, tuple[object, str]]
    body: tuple[TensorRule, ...]
    classes: tuple[ModelClass, ...]
    word_embedding: str
    obsolete: tuple[str, ...]
    megatron: MegatronLM | None

    # ------------------------------------------------------------------ configurations

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

        Raises:
            UnsupportedError: The models of this package cannot honour the configuration.
        """
        sizes: dict[str, int] = {}
        for name, where in self.size_fields.items():
            value = where.read(config)
            if value is None and where.default is None:
                value = 4 * sizes["hidden_size"]
            if not isinstance(value, int) or value < 1:
                raise UnsupportedError(f"{where.name}={value!r} in the configuration is not a positive integer.")
            if value > (largest := _MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE):
                raise UnsupportedError(
                    f"{where.name}={value} in the configuration is more than {largest}, a damaged number?"
                )
            sizes[name] = value
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        if hidden % heads:
            raise UnsupportedError(
                f"hidden_size={hidden} is not divisible by num_attention_heads={heads}; every head must have the same "
                "size."
            )
        for name, (only, reason) in self.required.items():
            if (value := config.get(name) or only) != only:
                raise UnsupportedError(f"{name}={value!r} is not supported: {reason}.")
        return {**sizes, "query_key_value": 3 * hidden, "num_labels": _number_of_labels(config)}

    def activations(self, config: Config) -> tuple[Any, Any]:
        """Names of the activation in the layers and of the one in the masked-LM head."""
        in_layers = self.activation.read(config)
        return in_layers, (config.get(self.head_activation) if self.head_activation else None) or in_layers

    def stock_mismatch(self, config: Config) -> str | None:
        """Say in a sentence what the stock class computes differently under a configuration, or None."""
        in_layers, in_head = self.activations(config)
        if is_same_function(in_layers, in_head):
            return None
        size = " (up to 4.7e-4 in each activation, about 1e-3 in the logits)" if "gelu" in f"{in_layers}" else ""
        return (
            f"The stock class has one activation, {self.activation.name}={in_layers!r}, and applies it in the masked-LM "
            f"head too, where this model has {in_head!r}{size}."
        )

    # ------------------------------------------------------------------ classes and tensors

    def model_class(self, name: str | None) -> ModelClass:
        """The class of this name, stock or ours; the first class if ``name`` is None.

        Raises:
            UnsupportedError: The architecture has no such class here.
        """
        if name is None:
            return self.classes[0]
        for model_class in self.classes:
            if name in (model_class.stock, model_class.ours):
                return model_class
        known = ", ".join(model_class.stock for model_class in self.classes)
        raise UnsupportedError(f"{name} is not one of the {self.name} classes offered here: {known}.")

    def tensors(self, config: Config, model_class: ModelClass) -> dict[str, Tensor]:
        """Every tensor in the state dict of ``model_class`` under ``config``, by name, rule by rule."""
        sizes = self.sizes(config)
        prefix = f"{self.base_prefix}." if model_class.has_prefix else ""
        tied = model_class.tied if config.get("tie_word_embeddings", True) else {}
        rules = [(prefix + rule.name, rule) for rule in self.body if rule.name not in model_class.without]
        rules += [(rule.name, rule) for rule in model_class.head if rule.name not in tied]
        return {tensor.name: tensor for name, rule in rules for tensor in _instances(name, rule, sizes)}

    def has_pooler(self, model_class: ModelClass) -> bool:
        """Whether a class has a pooler on the first token."""
        return any("pooler" in rule.module and rule.name not in model_class.without for rule in self.body)

    def check_degree(self, config: Config, tp_size: int) -> None:
        """Raise PartitionError if a model of this configuration cannot be cut over ``tp_size`` ranks.

        Needs the configuration only, so that it can be called before any weight is read.
        """
        if tp_size < 1:
            raise PartitionError(f"tp_size={tp_size} is not a degree; choose 1 or more.")
        heads = self.sizes(config)["num_attention_heads"]
        if heads % tp_size:
            limit = min(heads, _MAX_LISTED_DEGREE)
            choices = _listed([degree for degree in range(1, limit + 1) if heads % degree == 0])
            raise PartitionError(
                f"num_attention_heads={heads} is not divisible by tp_size={tp_size}; choose {choices}."
            )
        for tensor in self.tensors(config, self.classes[0]).values():
            tensor.spec.check(tensor.name, tensor.shape, tp_size)

    @cached_property
    def rules(self) -> tuple[TensorRule, ...]:
        """All rules: the body's, then each head's once."""
        heads = {rule.name: rule for model_class in self.classes for rule in model_class.head}
        return self.body + tuple(heads.values())

    def module_specs(self, module: str) -> dict[str, Spec]:
        """Cuts of one module's parameters: ``module_specs("h.*.attn.c_attn") -> {"weight": ..., "bias": ...}``."""
        specs = {rule.parameter: rule.spec for rule in self.rules if rule.module == module}
        assert specs, f"{module} is not in the {self.name} table"
        return specs

    def rule_of(self, name: str) -> TensorRule:
        """The rule of a concrete parameter name, with or without the base prefix.

        Raises:
            PartitionError: The name is not in the table.
        """
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        names = (pattern, pattern.removeprefix(f"{self.base_prefix}."))
        rule = next((rule for rule in self.rules if rule.name in names), None)
        if rule is None:
            raise PartitionError(f"{name} is not a parameter of the {self.name} table.")
        return rule

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


def _number_of_labels(config: Config) -> int:
    """``num_labels``, which config.json may say in words (``id2label``) or not at all."""
    labels, names = config.get("num_labels"), config.get("id2label")
    if isinstance(labels, int):
        return labels
    return len(names) if isinstance(names, Mapping) else 2


def _instances(name: str, rule: TensorRule, sizes: Mapping[str, int]) -> Iterator[Tensor]:
    shape = tuple(sizes[size] if isinstance(size, str) else size for size in rule.sizes)
    if "*" not in name:
        yield Tensor(name, shape, rule.spec)
        return
    for layer in range(sizes["num_hidden_layers"]):
        yield Tensor(name.replace("*", str(layer), 1), shape, rule.spec)


def _listed(numbers: list[int]) -> str:
    """``1, 5 or 25``."""
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
