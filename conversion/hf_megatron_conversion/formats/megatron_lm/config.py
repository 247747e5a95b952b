"""From Megatron-LM's arguments, and what the tensors show, to a config.json of the stock library."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_megatron.architectures import BERT_POST, BERT_PRE, GPT2, PartitionTable, table_for
from hf_megatron.errors import UnsupportedError
from hf_megatron_conversion.formats.megatron_lm.arguments import (
    ERF,
    TANH,
    Arguments,
    activations,
    padded_vocab_size,
    value_of,
    vocab_size_of,
)

_logger = logging.getLogger(__name__)

EPSILON = 1e-5
"""LayerNorm's in every version of Megatron-LM, unless it was told otherwise."""
_MEGATRON_BERT_DEFAULT_EPSILON = 1e-12
_GPT2_VOCAB_SIZE = 50257
_GPT2_SIZES = {
    "n_embd": ("hidden_size", "hidden_size"),
    "n_layer": ("num_hidden_layers", "num_layers"),
    "n_head": ("num_attention_heads", "num_attention_heads"),
    "n_positions": ("max_position_embeddings", "max_position_embeddings"),
}
_BERT_SIZES = {
    "hidden_size": ("hidden_size", "hidden_size"),
    "num_hidden_layers": ("num_hidden_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "num_attention_heads"),
    "max_position_embeddings": ("max_position_embeddings", "max_position_embeddings"),
}
_IDENTITY = ("model_type", "architectures", "layernorm_placement", "torch_dtype", "vocab_size", "tie_word_embeddings")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the tensors show of the model.

    Attributes:
        is_bert: Whether it is a BERT.
        is_core: Whether the names are Megatron-core's.
        sizes: Its sizes, by Megatron's names: ``hidden_size``, ``num_layers``, ``max_position_embeddings``,
            ``ffn_hidden_size``.
        padded_vocab_size: Rows of the word embedding.
        tp_size: Tensor-parallel degree.
        num_token_types: Rows of BERT's token-type embedding, or None.
        has_binary_head: Whether BERT's second head is there.
        is_tied: Whether the head is the word embedding.
        dtype: Of the word embedding, as torch calls it.
    """

    is_bert: bool
    is_core: bool
    sizes: Mapping[str, int]
    padded_vocab_size: int
    tp_size: int
    num_token_types: int | None
    has_binary_head: bool
    is_tied: bool
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What is known from outside of the ranks' files.

    Attributes:
        config: A config.json, from the user or from beside the checkpoint.
        is_asked_for: Whether the user gave it, so that it may contradict the arguments.
        vocab_size: The vocabulary without padding, from the user.
        tokenizer_size: The same from the tokenizer.
        end_of_text: The tokenizer's token that ends a text.
        is_only_described: Whether no tensor will be read, for which one has to know the number of heads.
    """

    config: Mapping[str, Any] | None = None
    is_asked_for: bool = False
    vocab_size: int | None = None
    tokenizer_size: int | None = None
    end_of_text: int | None = None
    is_only_described: bool = False


def config_of(
    found: Found, arguments: Arguments | None, given: Outside, problems: list[str]
) -> tuple[dict[str, Any], PartitionTable, bool]:
    """The stock config.json of a Megatron-LM checkpoint.

    Args:
        found: What its tensors show.
        arguments: Its training arguments, if it has any.
        given: What else is known.
        problems: Extended by what contradicts itself or is not known.

    Returns:
        The configuration, its partition table, and whether the size of the vocabulary is known; if not, padding counts
        as vocabulary.
    """
    table, other = _table(found, arguments, given.config, problems)
    names = _BERT_SIZES if found.is_bert else _GPT2_SIZES
    config: dict[str, Any] = {
        "model_type": table.stock_model_type,
        "architectures": [_class_name(found, table, other)],
        "tie_word_embeddings": found.is_tied,
        "dtype": found.dtype,
        **_sizes(found, arguments or {}, other, names, problems, is_described=given.is_only_described),
        **_numerics(found, arguments, other, table, given.is_asked_for),
    }
    vocab_size, is_known = _vocab_size(found, arguments or {}, given, problems)
    config["vocab_size"] = vocab_size
    if found.is_bert:
        config["type_vocab_size"] = found.num_token_types or 2
        config.setdefault("pad_token_id", 0)
    else:
        end = given.end_of_text
        if end is None and vocab_size == _GPT2_VOCAB_SIZE:
            end = _GPT2_VOCAB_SIZE - 1
        config |= {"bos_token_id": end, "eos_token_id": end}
    known = {*config, *_IDENTITY, *(alias for alias, _ in names.values())}
    rest = {name: value for name, value in other.items() if name not in known or name.endswith("_token_id")}
    return {**config, **rest}, table, is_known


def _table(
    found: Found, arguments: Arguments | None, given: Mapping[str, Any] | None, problems: list[str]
) -> tuple[PartitionTable, Mapping[str, Any]]:
    """The model's table, and the given configuration if it is for a model of this kind."""
    is_post = bool((arguments or {}).get("apply_residual_connection_post_layernorm"))
    table = GPT2 if not found.is_bert else BERT_POST if is_post else BERT_PRE
    if given is None:
        return table, {}
    try:
        other = table_for(given)
    except UnsupportedError as error:
        problems.append(f"the given config.json: {error}")
        return table, {}
    if other is table or (arguments is None and other.architecture == table.architecture):
        return other, given
    kinds = [f"{t.architecture} {t.own_config or ''}".strip() for t in (other, table)]
    problems.append(f"the given config.json is for {kinds[0]}, the checkpoint is {kinds[1]}")
    return table, {}


def _class_name(found: Found, table: PartitionTable, given: Mapping[str, Any]) -> str:
    """A BERT without its second head is a masked language model; one with it may be taken for that."""
    if not found.is_bert:
        return table.classes[0].stock
    named = str((given.get("architectures") or [""])[0])
    is_masked_lm = not found.has_binary_head or named.endswith("ForMaskedLM")
    ending = "ForMaskedLM" if is_masked_lm else "ForPreTraining"
    return next(known.stock for known in table.classes if known.stock.endswith(ending))


def _sizes(
    found: Found,
    arguments: Arguments,
    given: Mapping[str, Any],
    names: Mapping[str, tuple[str, str]],
    problems: list[str],
    *,
    is_described: bool,
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, (alias, argument) in names.items():
        values = {
            "the tensors": found.sizes.get(argument),
            "the arguments": arguments.get(argument),
            "the given config.json": given.get(name, given.get(alias)),
        }
        known = {source: value for source, value in values.items() if value is not None}
        if len(set(map(repr, known.values()))) > 1:
            said = ", ".join(f"{value_of(value)} in {source}" for source, value in known.items())
            problems.append(f"{argument} is {said}")
        result[name] = next(iter(known.values()), None)
    head_name = "num_attention_heads" if found.is_bert else "n_head"
    if result[head_name] is None and is_described:
        result[head_name] = 1
    elif result[head_name] is None:
        problems.append(
            "the files have no arguments, and nothing else says how many attention heads there are: give a config.json "
            f'(--config FILE), at least {{"model_type": "{"megatron-bert" if found.is_bert else "gpt2"}", '
            f'"{head_name}": ...}}'
        )
    hidden, ffn = found.sizes["hidden_size"], found.sizes["ffn_hidden_size"]
    stated = arguments.get("ffn_hidden_size")
    if isinstance(stated, int) and stated != ffn:
        problems.append(f"ffn_hidden_size is {ffn} in the tensors, {stated} in the arguments")
    if found.is_bert:
        result["intermediate_size"] = ffn
    else:
        result["n_inner"] = None if ffn == 4 * hidden else ffn
    return result


def _numerics(
    found: Found, arguments: Arguments | None, given: Mapping[str, Any], table: PartitionTable, is_asked_for: bool
) -> dict[str, Any]:
    """What no tensor shows: eps, activations, dropout, the scale of initialisation."""
    stated = arguments or {}
    acts = activations(arguments, is_core=found.is_core, is_bert=found.is_bert)
    epsilon = stated.get("layernorm_epsilon", stated.get("norm_epsilon", EPSILON))
    hidden_dropout, attention_dropout = stated.get("hidden_dropout", 0.1), stated.get("attention_dropout", 0.1)
    deviation = stated.get("init_method_std", 0.02)
    if not found.is_bert:
        own = {"layer_norm_epsilon": epsilon, "activation_function": acts.mlp}
        rest = {"resid_pdrop": hidden_dropout, "embd_pdrop": hidden_dropout, "attn_pdrop": attention_dropout}
    else:
        own = {"layer_norm_eps": epsilon, "hidden_act": acts.mlp}
        rest = {"hidden_dropout_prob": hidden_dropout, "attention_probs_dropout_prob": attention_dropout}
        if acts.head != acts.mlp:
            own["prediction_head_act"] = acts.head
    for name in own:
        if name not in given or _is_same(own[name], given[name]):
            own[name] = given.get(name, own[name])
        elif table is BERT_PRE and given[name] == _MEGATRON_BERT_DEFAULT_EPSILON:
            _logger.warning(
                "The given config.json has %s=1e-12, which transformers writes for this model when nobody has chosen; "
                "%s is used, which Megatron-LM was trained with.",
                name,
                own[name],
            )
        elif arguments is None or is_asked_for:
            if arguments is not None:
                _logger.warning(
                    "The given config.json has %s=%s, the checkpoint's arguments %s; the config.json's is used.",
                    name,
                    given[name],
                    own[name],
                )
            own[name] = given[name]
        else:
            _logger.warning(
                "The config.json beside the checkpoint has %s=%s, the checkpoint's arguments %s, which is used.",
                name,
                given[name],
                own[name],
            )
    return own | {"initializer_range": deviation} | {k: given.get(k, v) for k, v in rest.items()}


def _is_same(a: object, b: object) -> bool:
    """Whether two names or numbers mean the same function."""
    return a == b or any(a in family and b in family for family in (TANH, ERF))


def _vocab_size(found: Found, arguments: Arguments, given: Outside, problems: list[str]) -> tuple[int, bool]:
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
            _warn_of_other_padding(size, rows, arguments.get("make_vocab_size_divisible_by"), found.tp_size)
            return size, True
    return rows, False


def _warn_of_other_padding(size: int, rows: int, divisor: object, tp_size: int) -> None:
    if not isinstance(divisor, int) or divisor < 1:
        return
    padded = padded_vocab_size(size, divisor, tp_size)
    if padded != rows:
        _logger.warning(
            "A vocabulary of %d would be padded to %d at degree %d, but the word embedding has %d rows; is %d right?",
            size,
            padded,
            tp_size,
            rows,
            size,
        )
