"""The partition table: every tensor of an architecture, its shape in terms of the configuration, and its cut.

This is the one place that knows how a model is divided. The layers take their placements from it, the loader and the
converter their expected names, shapes and boxes, and the planner its sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from hf_megatron.errors import PartitionError, UnsupportedError
from hf_megatron.partition.spec import Shape, Spec

Config = Mapping[str, object]

# Beyond any model, so that a damaged configuration does not become a table of a billion rows.
_MAX_LAYERS = 10_000
_MAX_SIZE = 2**30
_MAX_LISTED_DEGREE = 4096


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One row of the table.

    Attributes:
        name: Parameter name relative to the base model (``h.*.attn.c_attn.weight``, ``*`` is the layer), or for a
            head's parameter relative to the model with the head (``lm_head.weight``).
        sizes: The dimensions, as names that :attr:`PartitionTable.sizes` turns into numbers.
        spec: How the tensor is cut.
    """

    name: str
    sizes: tuple[str, ...]
    spec: Spec

    @property
    def module(self) -> str:
        """The module the parameter belongs to: everything before the last dot."""
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """The parameter's own name: everything after the last dot."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a concrete model: its full shape and its cut."""

    name: str
    shape: Shape
    spec: Spec


@dataclass(frozen=True, slots=True)
class ModelClass:
    """A model class with its head, under the stock library's name and ours.

    Attributes:
        stock: Class name in transformers.
        ours: Class name in this package.
        head: Rules of the head's parameters; empty for the base model.
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


@dataclass(frozen=True)
class PartitionTable:
    """All tensors of one architecture.

    Attributes:
        architecture: Short name (``gpt2``).
        model_type: Our ``model_type`` in config.json.
        stock_model_type: transformers' ``model_type``.
        base_prefix: Prefix of the base model's parameters in a model with a head, without the dot.
        body: Rules of the base model's parameters.
        classes: The model classes; the first one is assumed where config.json names none.
        word_embedding: Name of the word embedding in ``body``.
        obsolete: Patterns of tensors that old checkpoints carry and the models do not have any more.
        sizes: Turns a config.json into the numbers behind the names in ``TensorRule.sizes``, filling in the stock
            defaults; raises UnsupportedError for a configuration that the parallel models cannot honour.
        own_config: Fields that our configuration has beyond the stock one, with the values this table is for.
        divisors: Names of sizes that the degree must divide (the number of heads).
        stock_mismatch: Says in a sentence what the stock class computes differently under a configuration, or None.
    """

    architecture: str
    model_type: str
    stock_model_type: str
    base_prefix: str
    body: tuple[TensorRule, ...]
    classes: tuple[ModelClass, ...]
    word_embedding: str
    obsolete: tuple[str, ...]
    sizes: Callable[[Config], dict[str, int]]
    own_config: Mapping[str, object] = field(default_factory=dict)
    divisors: tuple[str, ...] = ("num_attention_heads",)
    stock_mismatch: Callable[[Config], str | None] = lambda config: None

    @cached_property
    def rules(self) -> tuple[TensorRule, ...]:
        """All rules: the body's, then each head's once."""
        heads = {rule.name: rule for model_class in self.classes for rule in model_class.head}
        return self.body + tuple(heads.values())

    def module_specs(self, module: str) -> dict[str, Spec]:
        """Cuts of one module's parameters: ``module_specs("h.*.attn.c_attn") -> {"weight": ..., "bias": ...}``."""
        specs = {rule.parameter: rule.spec for rule in self.rules if rule.module == module}
        assert specs, f"{module} is not in the {self.architecture} table"
        return specs

    def is_for(self, config: Config) -> bool:
        """Whether this is the table of a config.json, ours or the stock one."""
        model_type = config.get("model_type")
        if model_type == self.model_type:
            return all(config.get(name) == value for name, value in self.own_config.items())
        return model_type == self.stock_model_type

    def config_of(self, config: Config, model_class: ModelClass, *, stock: bool) -> dict[str, object]:
        """A config.json that names the stock classes, or ours; what both have in common stays as it is."""
        result = {name: value for name, value in config.items() if name not in self.own_config}
        if not stock:
            result |= self.own_config
        result["model_type"] = self.stock_model_type if stock else self.model_type
        result["architectures"] = [model_class.stock if stock else model_class.ours]
        return result

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
        raise UnsupportedError(f"{name} is not one of the {self.architecture} classes offered here: {known}.")

    def tensors(self, config: Config, model_class: ModelClass) -> dict[str, Tensor]:
        """Every tensor in the state dict of ``model_class`` under ``config``, by name, rule by rule."""
        sizes = self.sizes(config)
        prefix = f"{self.base_prefix}." if model_class.has_prefix else ""
        rules = [(prefix + rule.name, rule) for rule in self.body if rule.name not in model_class.without]
        rules += [(rule.name, rule) for rule in self._head_rules(config, model_class)]
        return {tensor.name: tensor for name, rule in rules for tensor in _instances(name, rule, sizes)}

    def _head_rules(self, config: Config, model_class: ModelClass) -> Iterator[TensorRule]:
        is_tied = bool(config.get("tie_word_embeddings", True))
        for rule in model_class.head:
            if not (is_tied and rule.name in model_class.tied):
                yield rule

    def check_degree(self, config: Config, tp_size: int) -> None:
        """Raise PartitionError if a model of this configuration cannot be cut over ``tp_size`` ranks.

        Needs the configuration only, so that it can be called before any weight is read.
        """
        if tp_size < 1:
            raise PartitionError(f"tp_size={tp_size} is not a degree; choose 1 or more.")
        sizes = self.sizes(config)
        for name in self.divisors:
            if sizes[name] % tp_size:
                limit = min(sizes[name], _MAX_LISTED_DEGREE)
                choices = _listed([d for d in range(1, limit + 1) if sizes[name] % d == 0])
                raise PartitionError(f"{name}={sizes[name]} is not divisible by tp_size={tp_size}; choose {choices}.")
        for tensor in self.tensors(config, self.classes[0]).values():
            tensor.spec.check(tensor.name, tensor.shape, tp_size)

    def is_obsolete(self, name: str) -> bool:
        """Whether ``name``, with or without the base prefix, is a buffer that old checkpoints carry for nothing."""
        relative = name.removeprefix(f"{self.base_prefix}.")
        return any(fnmatchcase(relative, pattern) for pattern in self.obsolete)

    def spec_of(self, name: str) -> Spec:
        """The cut of a concrete parameter name, with or without the base prefix.

        Raises:
            PartitionError: The name is not in the table.
        """
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        for rule in self.rules:
            if rule.name in (pattern, pattern.removeprefix(f"{self.base_prefix}.")):
                return rule.spec
        raise PartitionError(f"{name} is not a parameter of the {self.architecture} partition table.")


def integer_sizes(
    config: Config, defaults: Mapping[str, int], aliases: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Sizes from a config.json, under the names of ``defaults``, whose values stand in for what it leaves out.

    Args:
        config: The configuration.
        defaults: Name and default of each size.
        aliases: Other names under which some of them may be found.

    Raises:
        UnsupportedError: A size is not a positive integer, or larger than any model's.
    """
    sizes = {}
    for name, default in defaults.items():
        value = config.get(name, config.get((aliases or {}).get(name, name), default))
        if not isinstance(value, int) or value < 1:
            raise UnsupportedError(f"{name}={value!r} in the configuration is not a positive integer.")
        largest = _MAX_LAYERS if "layer" in name else _MAX_SIZE
        if value > largest:
            raise UnsupportedError(f"{name}={value} in the configuration is more than {largest}, a damaged number?")
        sizes[name] = value
    return sizes


def number_of_labels(config: Config) -> int:
    """``num_labels``, which config.json may say in words (``id2label``) or not at all."""
    labels, names = config.get("num_labels"), config.get("id2label")
    if isinstance(labels, int):
        return labels
    return len(names) if isinstance(names, Mapping) else 2


def _instances(name: str, rule: TensorRule, sizes: Mapping[str, int]) -> Iterator[Tensor]:
    shape = tuple(sizes[size] for size in rule.sizes)
    if "*" not in name:
        yield Tensor(name, shape, rule.spec)
        return
    for layer in range(sizes["num_hidden_layers"]):
        yield Tensor(name.replace("*", str(layer), 1), shape, rule.spec)


def _listed(numbers: list[int]) -> str:
    """``1, 5 or 25``."""
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
