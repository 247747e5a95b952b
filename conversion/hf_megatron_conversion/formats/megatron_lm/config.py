"""From Megatron-LM's arguments, and what the tensors show, to a config.json of the stock library."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_megatron.architectures import Architecture, table_for
from hf_megatron.architectures.table import is_same_function
from hf_megatron.errors import UnsupportedError
from hf_megatron_conversion.formats.megatron_lm.arguments import (
    Arguments,
    activations,
    megatron_of,
    padded_vocab_size,
    vocab_size_of,
)
from hf_megatron_conversion.formats.megatron_lm.names import has_second_head
from hf_megatron_conversion.formats.megatron_lm.pickled import value_of

_logger = logging.getLogger(__name__)

_EPSILON = 1e-5  # LayerNorm's in every version of Megatron-LM, unless it was told otherwise
# Megatron's arguments for the sizes of an architecture that config.json has to say.
_SIZE_ARGUMENTS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_positions": "max_position_embeddings",
    "intermediate_size": "ffn_hidden_size",
}
_IDENTITY = ("model_type", "architectures", "torch_dtype", "vocab_size", "tie_word_embeddings")


@dataclass(frozen=True, kw_only=True)
class DetectedModel:
    """What the tensors show of the model."""

    table: Architecture
    is_core: bool  # whether the names are Megatron-core's
    sizes: Mapping[str, int]  # by the architecture's names for them, without the heads' and the vocabulary's
    padded_vocab_size: int  # rows of the word embedding
    tp_size: int
    has_binary_head: bool  # whether BERT's second head is there
    is_tied: bool  # whether the head is the word embedding
    dtype: str  # of the word embedding, as torch calls it


@dataclass(frozen=True, kw_only=True)
class ExternalFacts:
    """What is known from outside of the ranks' files."""

    config: Mapping[str, Any] | None = None  # from the user, or from beside the checkpoint
    is_asked_for: bool = False  # whether the user gave it, so that it may contradict the arguments
    vocab_size: int | None = None  # without padding, from the user
    tokenizer_size: int | None = None  # the same from the tokenizer
    end_of_text: int | None = None  # the tokenizer's token that ends a text
    is_only_described: bool = False  # whether no tensor will be read, for which one has to know the number of heads


def config_of(
    found: DetectedModel, arguments: Arguments | None, given: ExternalFacts, problems: list[str]
) -> tuple[dict[str, Any], Architecture, bool]:
    """The stock config.json of a Megatron-LM checkpoint, and its table.

    The last result is whether the size of the vocabulary is known; if not, padding counts as vocabulary. ``problems``
    is extended by what contradicts itself or is not known.
    """
    table, other = _table(found.table, arguments, given.config, problems)
    vocab_size, is_known = _vocab_size(found, arguments or {}, given, problems)
    config: dict[str, Any] = {
        "model_type": table.stock_model_type,
        "architectures": [_class_name(found, table, other)],
        "tie_word_embeddings": found.is_tied,
        "dtype": found.dtype,
        **_sizes(found, table, arguments or {}, other, problems, is_described=given.is_only_described),
        **_numerics(found, arguments, other, table, given.is_asked_for),
        "vocab_size": vocab_size,
    }
    if table.is_causal:
        end = given.end_of_text
        if end is None and vocab_size == table.size_fields["vocab_size"].default:
            end = vocab_size - 1
        config |= {"bos_token_id": end, "eos_token_id": end}
    else:
        config["pad_token_id"] = 0
    known = {*config, *_IDENTITY, *table.own_config, *(where.alias for where in table.size_fields.values())}
    rest = {name: value for name, value in other.items() if name not in known or name.endswith("_token_id")}
    return {**config, **rest}, table, is_known


def _table(
    table: Architecture, arguments: Arguments | None, given: Mapping[str, Any] | None, problems: list[str]
) -> tuple[Architecture, Mapping[str, Any]]:
    """The model's table, and the given configuration if it is for a model of this kind."""
    if given is None:
        return table, {}
    try:
        other = table_for(given)
    except UnsupportedError as error:
        problems.append(f"the given config.json: {error}")
        return table, {}
    # Without arguments nothing in the files says where the norms stand.
    if other is table or (arguments is None and other.name == table.name):
        return other, given
    kinds = [f"{t.name} {t.own_config or ''}".strip() for t in (other, table)]
    problems.append(f"the given config.json is for {kinds[0]}, the checkpoint is {kinds[1]}")
    return table, {}


def _class_name(found: DetectedModel, table: Architecture, given: Mapping[str, Any]) -> str:
    """A BERT without its second head is a masked language model; one with it may be taken for that."""
    fitting = [
        known
        for known in table.classes
        if known.is_language_model and (found.has_binary_head or not has_second_head(known))
    ]
    names = given.get("architectures")
    named = names[0] if isinstance(names, list) and names else None
    return next((known.stock for known in fitting if named in (known.stock, known.ours)), fitting[0].stock)


def _sizes(
    found: DetectedModel,
    table: Architecture,
    arguments: Arguments,
    given: Mapping[str, Any],
    problems: list[str],
    *,
    is_described: bool,
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for size, argument in _SIZE_ARGUMENTS.items():
        where = table.size_fields[size]
        values = {
            "the tensors": found.sizes.get(size),
            "the arguments": arguments.get(argument),
            "the given config.json": given.get(where.name, given.get(where.alias)),
        }
        known = {source: value for source, value in values.items() if value is not None}
        if len(set(map(repr, known.values()))) > 1:
            said = ", ".join(f"{value_of(value)} in {source}" for source, value in known.items())
            problems.append(f"{argument} is {said}")
        result[where.name] = next(iter(known.values()), None)
    inner, heads = table.size_fields["intermediate_size"], table.size_fields["num_attention_heads"].name
    if inner.default is None and result[inner.name] == 4 * found.sizes["hidden_size"]:
        result[inner.name] = None
    if types := table.size_fields.get("num_token_types"):
        result[types.name] = found.sizes.get("num_token_types", types.default)
    if result[heads] is None and is_described:
        result[heads] = 1
    elif result[heads] is None:
        problems.append(
            "the files have no arguments, and nothing else says how many attention heads there are: give a config.json "
            f'(--config FILE), at least {{"model_type": "{table.stock_model_type}", "{heads}": ...}}'
        )
    return result


def _numerics(
    found: DetectedModel, arguments: Arguments | None, given: Mapping[str, Any], table: Architecture, is_asked_for: bool
) -> dict[str, Any]:
    """What no tensor shows: eps, activations, dropout, the scale of initialisation."""
    stated = arguments or {}
    acts = activations(arguments, table, is_core=found.is_core)
    epsilon = stated.get("layernorm_epsilon", stated.get("norm_epsilon", _EPSILON))
    own = {table.epsilon.name: epsilon, table.activation.name: acts.mlp}
    if table.head_activation is not None and acts.head != acts.mlp:
        own[table.head_activation] = acts.head
    for name, value in own.items():
        if name not in given or is_same_function(value, given[name]):
            own[name] = given.get(name, value)
            continue
        is_unchosen = given[name] == megatron_of(table).unchosen_epsilon
        if is_unchosen:
            message = (
                "The given config.json has %s=%s, which transformers writes for this model when nobody has chosen; %s "
                "is used, which Megatron-LM was trained with."
            )
        elif arguments is None or is_asked_for:
            own[name] = given[name]
            message = "The given config.json has %s=%s, the checkpoint's arguments %s; the config.json's is used."
        else:
            message = "The config.json beside the checkpoint has %s=%s, the checkpoint's arguments %s, which is used."
        if is_unchosen or arguments is not None:
            _logger.warning(message, name, given[name], value)
    hidden, attention = stated.get("hidden_dropout", 0.1), stated.get("attention_dropout", 0.1)
    dropouts = {where.name: rate for where, rate in zip(table.dropouts, (hidden, attention, hidden), strict=True)}
    rest = {name: given.get(name, rate) for name, rate in dropouts.items()}
    return own | {"initializer_range": stated.get("init_method_std", 0.02)} | rest


def _vocab_size(
    found: DetectedModel, arguments: Arguments, given: ExternalFacts, problems: list[str]
) -> tuple[int, bool]:
    """The vocabulary without padding, from the first source that knows it, and whether one does."""
    rows = found.padded_vocab_size
    beside = (given.config or {}).get("vocab_size")
    asked = {
        "the given vocab_size": given.vocab_size,
        "vocab_size in the given config.json": beside if given.is_asked_for else None,
        "the size of the tokenizer": given.tokenizer_size,
    }
    for source, size in asked.items():
        if size is not None and (not isinstance(size, int) or not 0 < size <= rows):
            problems.append(f"{source} is {value_of(size)}, but the word embedding has {rows} rows")
    stated = vocab_size_of(arguments)
    # What nobody has asked for is used if it can be right.
    for size in (*asked.values(), stated, beside):
        if isinstance(size, int) and 0 < size <= rows:
            divisor = arguments.get("make_vocab_size_divisible_by")
            if isinstance(divisor, int) and divisor > 0:
                _warn_of_other_padding(size, rows, padded_vocab_size(size, divisor, found.tp_size), found.tp_size)
            return size, True
    return rows, False


def _warn_of_other_padding(size: int, rows: int, padded: int, tp_size: int) -> None:
    if padded != rows:
        message = (
            "A vocabulary of %d would be padded to %d at degree %d, but the word embedding has %d rows; is %d right?"
        )
        _logger.warning(message, size, padded, tp_size, rows, size)
