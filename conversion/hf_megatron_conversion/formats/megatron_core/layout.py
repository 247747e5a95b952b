"""Megatron-core's names of what ``megatron_lm.layout`` lays out, and the extra state that its modules ask for."""

from __future__ import annotations

from hf_megatron.architectures import Architecture
from hf_megatron_conversion.formats import TransformerImpl
from hf_megatron_conversion.formats.megatron_lm.views import Bytes

_LINEAR = {
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
# Transformer Engine keeps the parameters of a norm in the linear layer behind it.
_NORMS: dict[TransformerImpl, dict[str, str]] = {
    "local": {"input_layernorm": "input_layernorm.", "post_attention_layernorm": "pre_mlp_layernorm."},
    "transformer_engine": {
        "input_layernorm": "self_attention.linear_qkv.layer_norm_",
        "post_attention_layernorm": "mlp.linear_fc1.layer_norm_",
    },
}

HEAD = "output_layer.weight"
EXTRA_STATE = "_extra_state"
"""The parameter, so to say, in which a module of Transformer Engine keeps what it needs for 8-bit numbers."""
NO_STATE = Bytes(b"\x80\x04N.")
"""The extra state of a module of Transformer Engine that has none: a pickle of None.

Versions up to 2.3 unpickle an empty tensor, 2.4 refuses None, and those from 2.17.1 on refuse pickles with names in
them. All take this one; Megatron-core's own modules ignore what they get.
"""


def body_of(table: Architecture) -> str:
    """The module that the layers are in."""
    return "decoder" if table.is_causal else "encoder"


def name_in_layer(name: str, impl: TransformerImpl) -> str:
    """The name of a layer's tensor behind the layer's: ``mlp.dense_h_to_4h.bias`` -> ``mlp.linear_fc1.bias``."""
    module, _, parameter = name.rpartition(".")
    norm = _NORMS[impl].get(module)
    return f"{_LINEAR[module]}.{parameter}" if norm is None else norm + parameter


def name_outside(name: str, body: str) -> str:
    """The name of a tensor that is in no layer."""
    if name.endswith("_embeddings.weight"):
        return f"embedding.{name}"
    if name.startswith("final_layernorm."):
        return f"{body}.{name}"
    if name == "lm_head.bias":
        return "output_layer.bias"
    return name.replace("lm_head.layernorm.", "lm_head.layer_norm.")


def states_in_layer(impl: TransformerImpl) -> list[str]:
    """The modules of a layer that ask for extra state."""
    attention = ["self_attention.core_attention"] if impl == "transformer_engine" else []
    return [*attention, *_LINEAR.values()]
