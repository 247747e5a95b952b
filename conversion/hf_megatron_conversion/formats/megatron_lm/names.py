"""The many names of Megatron-LM's tensors, and where each of them goes in the stock models.

Tensors go here by the names of the second generation (2021 to 2023) without what stands before ``layers``:
``layers.0.self_attention.query_key_value.weight``, ``word_embeddings.weight``, ``lm_head.dense.weight``. The layers of
all pipeline stages are counted through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_megatron.architectures import Architecture, ModelClass
from hf_megatron.errors import UnsupportedError

_QKV = "self_attention.query_key_value"
_DENSE = "self_attention.dense"
_FC1, _FC2 = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
_FIRST_NORM, _SECOND_NORM = "input_layernorm", "post_attention_layernorm"

VOCABULARY = ("word_embeddings.weight", "output_layer.weight", "word_embeddings_for_head.weight", "lm_head.bias")
"""Cut along the vocabulary, which is padded."""
COLUMN = (f"{_QKV}.weight", f"{_QKV}.bias", f"{_FC1}.weight", f"{_FC1}.bias")
"""Of a layer, cut on dim 0. Everything that is in none of these tuples is replicated."""
ROW = (f"{_DENSE}.weight", f"{_FC2}.weight")
"""Of a layer, cut on dim 1."""

# Wrappers around the model and the language model in it, which are in the names or not.
_WRAPPERS = re.compile(r"(?:(?:module|float16_module|model)\.)*(?:language_model\.)?")
_EMBEDDING = re.compile(r"(?:embedding\.)?((?:word|position|tokentype)_embeddings\.weight)")
_BODY = re.compile(
    r"(?:transformer|encoder|decoder)\.(?:final_(?:layer)?norm|layers\.([0-9]{1,5})\.(.+))\.(weight|bias)"
)
# transformer-engine keeps the parameters of a norm in the linear layer behind it.
_FUSED = re.compile(r"(?:encoder|decoder|transformer)\.layers\.([0-9]{1,5})\.(.+?)\.(layer_norm|fc1|fc2)_(weight|bias)")
_HEAD = re.compile(r"(?:pooler\.dense|lm_head\.dense|lm_head\.layer_?norm|binary_head)\.(?:weight|bias)")
_MODULES = {
    "input_layernorm": _FIRST_NORM,
    "input_norm": _FIRST_NORM,
    "post_attention_layernorm": _SECOND_NORM,
    "post_attention_norm": _SECOND_NORM,
    "pre_mlp_layernorm": _SECOND_NORM,
    "attention.query_key_value": _QKV,
    "self_attention.query_key_value": _QKV,
    "self_attention.linear_qkv": _QKV,
    "self_attention.layernorm_qkv": _QKV,
    "attention.dense": _DENSE,
    "self_attention.dense": _DENSE,
    "self_attention.linear_proj": _DENSE,
    "self_attention.proj": _DENSE,
    "mlp.dense_h_to_4h": _FC1,
    "mlp.linear_fc1": _FC1,
    "mlp.dense_4h_to_h": _FC2,
    "mlp.linear_fc2": _FC2,
}
_FUSED_MODULES = {
    ("self_attention.linear_qkv", "layer_norm"): _FIRST_NORM,
    ("self_attention.layernorm_qkv", "layer_norm"): _FIRST_NORM,
    ("mlp.linear_fc1", "layer_norm"): _SECOND_NORM,
    ("layernorm_mlp", "layer_norm"): _SECOND_NORM,
    ("layernorm_mlp", "fc1"): _FC1,
    ("layernorm_mlp", "fc2"): _FC2,
}


def own_name(stored: str) -> str | None:
    """The name a tensor goes by here, layers counted from 0 in its stage; None if the name is not known.

    Args:
        stored: The dotted name in the file.
    """
    wrappers = _WRAPPERS.match(stored)
    assert wrappers is not None
    name = stored[wrappers.end() :]
    if found := _EMBEDDING.fullmatch(name):
        return found[1]
    if found := _FUSED.fullmatch(name):
        module = _FUSED_MODULES.get((found[2], found[3]))
        return module and f"layers.{int(found[1])}.{module}.{found[4]}"
    if found := _BODY.fullmatch(name):
        if found[1] is None:
            return f"final_layernorm.{found[3]}"
        module = _MODULES.get(found[2])
        return module and f"layers.{int(found[1])}.{module}.{found[3]}"
    if name == "output_layer.bias":
        return "lm_head.bias"
    if name in VOCABULARY:
        return name
    return name.replace("layer_norm", "layernorm") if _HEAD.fullmatch(name) else None


def split_layer(name: str) -> tuple[int | None, str]:
    """Layer and name in the layer: ``layers.3.mlp.x`` -> (3, ``mlp.x``); (None, name) outside of the layers."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return (None, name) if found is None else (int(found[1]), found[2])


def megatron_names(table: Architecture, names: Iterable[str], num_layers: int) -> dict[str, str]:
    """Megatron's name for each of the stock names.

    Raises:
        UnsupportedError: Megatron-LM has no such parameter.
    """
    result = {}
    for name in names:
        pattern = table.rule_of(name).megatron
        if pattern is None:
            raise UnsupportedError(f"Megatron-LM has no parameter for {name}.")
        number = re.search(r"\.(\d+)\.", name)
        layer = int(number[1]) if number else 0
        if "+" in pattern and layer + 1 == num_layers:
            pattern = f"final_layernorm.{pattern.rpartition('.')[2]}"
        result[name] = pattern.replace("*", str(layer)).replace("+", str(layer + 1))
    return result


def has_second_head(model_class: ModelClass) -> bool:
    """Whether it is a BERT with both of Megatron-LM's heads."""
    return any(rule.megatron == "binary_head.weight" for rule in model_class.head)
