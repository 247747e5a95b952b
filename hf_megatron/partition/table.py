"""The partition table: every tensor of an architecture, its shape in terms of the configuration, and its cut.

This is the one place that knows how a model is divided. The layers take their placements from it, the loader and the
converter their expected names, shapes and boxes, and the planner its sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from hf_megatron.errors import PartitionError, UnsupportedError
from hf_megatron.partition.spec import Shape, Spec

__all__ = ["ModelClass", "PartitionTable", "Tensor", "TensorRule"]

Config = Mapping[str, object]


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
        tied_head: Name of the head's weight that is the word embedding itself when ``tie_word_embeddings`` is set.
    """

    stock: str
    ours: str
    head: tuple[TensorRule, ...] = ()
    has_prefix: bool = True
    tied_head: str | None = None


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
        divisors: Names of sizes that the degree must divide (the number of heads).
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
    divisors: tuple[str, ...] = ("num_attention_heads",)

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
        rules = [(prefix + rule.name, rule) for rule in self.body]
        rules += [(rule.name, rule) for rule in self._head_rules(config, model_class)]
        return {tensor.name: tensor for name, rule in rules for tensor in _instances(name, rule, sizes)}

    def _head_rules(self, config: Config, model_class: ModelClass) -> Iterator[TensorRule]:
        is_tied = bool(config.get("tie_word_embeddings", True))
        for rule in model_class.head:
            if not (is_tied and rule.name == model_class.tied_head):
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
                choices = _listed([d for d in range(1, sizes[name] + 1) if sizes[name] % d == 0])
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
