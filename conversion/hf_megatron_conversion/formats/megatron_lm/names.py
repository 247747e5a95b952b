"""The many names of Megatron-LM's tensors, and where each of them goes in the stock models.

Tensors go here by the names of the second generation (2021 to 2023) without what stands before ``layers``:
``layers.0.self_attention.query_key_value.weight``, ``word_embeddings.weight``, ``lm_head.dense.weight``. The layers of
all pipeline stages are counted through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hf_megatron.architectures import PartitionTable

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
_BODY = re.compile(r"(?:transformer|encoder|decoder)\.(?:final_(?:layer)?norm|layers\.(\d+)\.(.+))\.(weight|bias)")
# transformer-engine keeps the parameters of a norm in the linear layer behind it.
_FUSED = re.compile(r"(?:encoder|decoder|transformer)\.layers\.(\d+)\.(.+?)\.(layer_norm|fc1|fc2)_(weight|bias)")
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

# Stock module -> Megatron's. Of BERT's three projections each is a part of the fused one.
_GPT2 = {
    "wte": "word_embeddings",
    "wpe": "position_embeddings",
    "h.*.ln_1": f"layers.*.{_FIRST_NORM}",
    "h.*.attn.c_attn": f"layers.*.{_QKV}",
    "h.*.attn.c_proj": f"layers.*.{_DENSE}",
    "h.*.ln_2": f"layers.*.{_SECOND_NORM}",
    "h.*.mlp.c_fc": f"layers.*.{_FC1}",
    "h.*.mlp.c_proj": f"layers.*.{_FC2}",
    "ln_f": "final_layernorm",
    "lm_head": "output_layer",
}
_BERT = {
    "embeddings.word_embeddings": "word_embeddings",
    "embeddings.position_embeddings": "position_embeddings",
    "embeddings.token_type_embeddings": "tokentype_embeddings",
    "encoder.layer.*.attention.self.query": f"layers.*.{_QKV}",
    "encoder.layer.*.attention.self.key": f"layers.*.{_QKV}",
    "encoder.layer.*.attention.self.value": f"layers.*.{_QKV}",
    "encoder.layer.*.attention.output.dense": f"layers.*.{_DENSE}",
    "encoder.layer.*.intermediate.dense": f"layers.*.{_FC1}",
    "encoder.layer.*.output.dense": f"layers.*.{_FC2}",
    "pooler.dense": "pooler.dense",
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.layernorm",
    "cls.predictions": "lm_head",
    "cls.predictions.decoder": "output_layer",
    "cls.seq_relationship": "binary_head",
}
_BERT_PRE = {
    "encoder.layer.*.attention.ln": f"layers.*.{_FIRST_NORM}",
    "encoder.layer.*.ln": f"layers.*.{_SECOND_NORM}",
    "encoder.ln": "final_layernorm",
}
# With the residual taken behind the norm, every norm is where the original BERT has one, a slot later: the first one
# follows the embeddings, and the one before the next layer's attention follows this layer's MLP.
_BERT_POST = {
    "embeddings.LayerNorm": f"layers.0.{_FIRST_NORM}",
    "encoder.layer.*.attention.output.LayerNorm": f"layers.*.{_SECOND_NORM}",
    "encoder.layer.*.output.LayerNorm": f"layers.+.{_FIRST_NORM}",
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


def is_ignored(stored: str) -> bool:
    """Whether this is transformer-engine's own bookkeeping, which holds no weights."""
    return stored.endswith("._extra_state")


def split_layer(name: str) -> tuple[int | None, str]:
    """Layer and name in the layer: ``layers.3.mlp.x`` -> (3, ``mlp.x``); (None, name) outside of the layers."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return (None, name) if found is None else (int(found[1]), found[2])


def megatron_names(table: PartitionTable, names: Mapping[str, object], num_layers: int) -> dict[str, str]:
    """Megatron's name for each of the stock names."""
    prefix = f"{table.base_prefix}."
    modules = _GPT2
    if table.architecture == "bert":
        modules = _BERT | (_BERT_PRE if table.own_config["layernorm_placement"] == "pre" else _BERT_POST)
    result = {}
    for name in names:
        module, _, parameter = name.removeprefix(prefix).rpartition(".")
        number = re.search(r"\.(\d+)\.", module)
        layer = int(number[1]) if number else 0
        found = modules[re.sub(r"\.\d+\.", ".*.", module)].replace("*", str(layer))
        if "+" in found:
            found = found.replace("+", str(layer + 1)) if layer + 1 < num_layers else "final_layernorm"
        found = f"{found}.{parameter}"
        result[name] = "lm_head.bias" if found == "output_layer.bias" else found
    return result
