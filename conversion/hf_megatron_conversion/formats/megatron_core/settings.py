"""What Megatron-Bridge and NeMo write about a model, as the arguments that Megatron-LM would have for it.

    iter_0001000/run_config.yaml    Megatron-Bridge, beside the tensors; the model's fields under ``model``
    context/model.yaml              NeMo 2, beside ``weights/``; the model's fields under ``config``
    model_config.yaml               NeMo 1, beside ``model_weights/``; the model's fields

Source: ``ConfigContainer.to_dict`` and ``GPTModelProvider`` of Megatron-Bridge 0.1 to 0.6, ``GPTConfig`` and
``BertConfig`` of NeMo 2, ``megatron_gpt_config.yaml`` of NeMo 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from hf_megatron.checkpoint.budgets import MAX_YAML_BYTES, MAX_YAML_VALUES, BudgetError, is_64_bit, require_within
from hf_megatron.checkpoint.regular_file import open_regular
from hf_megatron.errors import CheckpointFormatError, shown

_BRIDGE, _NEMO_2, _NEMO_1 = "run_config.yaml", "context/model.yaml", "model_config.yaml"
# Fields that Megatron-LM has under another name.
_RENAMED = {
    "seq_length": "max_position_embeddings",  # of Megatron-Bridge and NeMo 2, which have no other number of positions
    "encoder_seq_length": "max_position_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "bias": "add_bias_linear",
    "num_moe_experts": "num_experts",
}
_NORMS = {"layernorm": "LayerNorm"}  # as NeMo 1 spells it
_TANH_GELU = "fast_gelu"
_MAX_DEPTH = 3  # of what is looked at


def arguments_beside(place: Path) -> dict[str, Any] | None:
    """What a file beside the tensors, in the directory ``place``, says of the model; None if there is no such file.

    CheckpointFormatError if it is not YAML, or too large.
    """
    for path, key in ((place / _BRIDGE, "model"), (place.parent / _NEMO_2, "config"), (place.parent / _NEMO_1, None)):
        if path.is_file():
            content = _read(path)
            fields = content if key is None else content.get(key)
            if not isinstance(fields, dict):
                raise CheckpointFormatError(f"{path} says nothing of the model (it has no {key!r}).")
            return _arguments(fields)
    return None


def is_nemo(place: Path) -> bool:
    """Whether NeMo wrote the directory with the tensors; its ``common.pt`` is another one than Megatron-LM's."""
    return (place.parent / _NEMO_2).is_file() or (place.parent / _NEMO_1).is_file()


def _arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    nested = fields.get("transformer")  # of newer ones, beside what is the model's own
    fields = {**fields, **nested} if isinstance(nested, dict) else fields
    arguments = {_RENAMED.get(name, name): value for name, value in fields.items() if not isinstance(value, dict)}
    if (positions := fields.get("max_position_embeddings")) is not None:
        arguments["max_position_embeddings"] = positions
    normalization = fields.get("normalization")
    arguments["normalization"] = _NORMS.get(str(normalization), normalization)
    if isinstance(is_tied := fields.get("share_embeddings_and_output_weights"), bool):
        arguments["untie_embeddings_and_output_weights"] = not is_tied
    groups, heads = fields.get("num_query_groups"), fields.get("num_attention_heads")
    arguments["group_query_attention"] = groups is not None and groups != heads
    activation = _name_of(fields.get("activation_func", fields.get("activation")))
    is_tanh = activation == _TANH_GELU or bool(fields.get("openai_gelu"))
    arguments["bias_gelu_fusion"] = is_tanh or bool(fields.get("bias_activation_fusion"))
    arguments["activation_func"] = None if activation == _TANH_GELU else activation
    return arguments


def _name_of(function: Any) -> str | None:
    """The name of a function: itself, or the last part of what a mapping says is to be imported."""
    target = function.get("_target_") if isinstance(function, dict) else function
    return None if target is None else str(target).rpartition(".")[2]


def _read(path: Path) -> dict[str, Any]:
    """A YAML file with nothing in it but mappings, sequences and scalars as JSON has them, or texts."""
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_YAML_BYTES + 1)
        require_within(MAX_YAML_BYTES, len(raw), "bytes at least")
        content = yaml.load(raw, Loader=yaml.BaseLoader)  # which makes texts of all scalars, and knows no merges
        fields = _plain(content, -1, count(1))
    except BudgetError as error:
        raise CheckpointFormatError(f"{path} is refused: {error}.") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise CheckpointFormatError(f"{path} is not valid YAML: {shown(str(error))}.") from None
    if not isinstance(fields, dict):
        raise CheckpointFormatError(f"{path} holds a {type(content).__name__} where a mapping is expected.")
    return fields


def _plain(value: Any, depth: int, number: Iterator[int]) -> Any:
    """Scalars as what they stand for; what lies deep is of no interest here.

    ``number`` counts values, each as often as it stands for something: an alias is the value itself, again.
    """
    require_within(MAX_YAML_VALUES, next(number), "values at least, with those that its aliases repeat")
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return {str(name): _plain(item, depth + 1, number) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, depth + 1, number) for item in value]
    try:
        scalar = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_scalar = isinstance(scalar, (bool, int, float, type(None))) and (
        not isinstance(scalar, int) or is_64_bit(scalar)
    )
    return scalar if is_scalar else value
