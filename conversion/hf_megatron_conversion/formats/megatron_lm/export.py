"""From a config.json to Megatron-LM's training arguments, or to a list of what they cannot say."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from hf_megatron.checkpoint import torch_dtype
from hf_megatron.errors import UnsupportedError
from hf_megatron_conversion.formats.base import Model
from hf_megatron_conversion.formats.megatron_lm.arguments import ERF, TANH

_logger = logging.getLogger(__name__)

# The stock configurations' own defaults, for what config.json leaves out.
_GPT2 = {"eps": 1e-5, "act": "gelu_new"}
_BERT = {"eps": 1e-12, "act": "gelu"}
_CLASSES = ("GPT2LMHeadModel", "ForPreTraining", "ForMaskedLM")


def arguments_of(
    model: Model, *, dtype: str, tp_size: int, divisor: int, padded_vocab_size: int, has_binary_head: bool
) -> dict[str, Any]:
    """The arguments under which Megatron-LM computes what the model computes.

    Args:
        model: The source.
        dtype: Of what is written, in safetensors' spelling.
        tp_size: Degree.
        divisor: The vocabulary is a multiple of this times the degree.
        padded_vocab_size: Which makes this.
        has_binary_head: Whether a BERT gets its second head; of a GPT, Megatron-LM's default.

    Raises:
        UnsupportedError: Megatron-LM's models cannot compute it; everything is listed.
    """
    config, sizes = model.config, model.table.sizes(model.config)
    is_bert = model.table.architecture == "bert"
    defaults = _BERT if is_bert else _GPT2
    mlp = config.get("hidden_act" if is_bert else "activation_function", defaults["act"])
    head = (config.get("prediction_head_act") or mlp) if is_bert else mlp
    if problems := [*_unsupported(model, mlp, head)]:
        raise UnsupportedError("Megatron-LM has no such model: " + "; ".join(problems) + ".")
    # The fused kernel has the tanh form in the layers and leaves BERT's head the exact one; openai_gelu is both.
    is_fused = mlp in TANH and (head in ERF if is_bert else mlp == "gelu_fast")
    hidden_dropout, attention_dropout = _dropout(config, is_bert)
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    positions = sizes["max_position_embeddings" if is_bert else "num_positions"]
    epsilon = config.get("layer_norm_eps" if is_bert else "layer_norm_epsilon", defaults["eps"])
    is_post = model.table.own_config.get("layernorm_placement") == "post"
    return {
        "num_layers": sizes["num_hidden_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": sizes["intermediate_size"],
        "num_attention_heads": heads,
        "kv_channels": hidden // heads,
        "max_position_embeddings": positions,
        "seq_length": positions,
        "add_position_embedding": True,
        "position_embedding_type": "learned_absolute",
        "use_rotary_position_embeddings": False,
        "make_vocab_size_divisible_by": divisor,
        "padded_vocab_size": padded_vocab_size,
        "orig_vocab_size": sizes["vocab_size"],
        "tokenizer_type": "BertWordPieceLowerCase" if is_bert else "GPT2BPETokenizer",
        "layernorm_epsilon": epsilon,
        "norm_epsilon": epsilon,
        "apply_layernorm_1p": False,
        "apply_residual_connection_post_layernorm": is_post,
        "apply_query_key_layer_scaling": False,
        "attention_softmax_in_fp32": True,
        "openai_gelu": mlp in TANH and not is_fused,
        "onnx_safe": None,
        "bias_gelu_fusion": is_fused,
        "squared_relu": False,
        "swiglu": False,
        "add_bias_linear": True,
        "bert_binary_head": has_binary_head,
        "num_experts": None,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        "hidden_dropout": hidden_dropout,
        "attention_dropout": attention_dropout,
        "init_method_std": config.get("initializer_range", 0.02),
        "fp16": dtype == "F16",
        "bf16": dtype == "BF16",
        "params_dtype": torch_dtype(dtype),
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "data_parallel_random_init": False,
        "iteration": 0,
    }


def _unsupported(model: Model, mlp: object, head: object) -> Iterator[str]:
    config = model.config
    if not model.model_class.stock.endswith(_CLASSES):
        yield f"a {model.model_class.stock} (only language models)"
    for name, value in (("activation", mlp), ("prediction_head_act", head)):
        if value not in TANH + ERF:
            yield f"{name}={value!r} (only {', '.join(TANH + ERF)})"
    if mlp in ERF and head in TANH:
        yield f"{mlp} in the layers with {head} in the head"
    if model.table.architecture == "bert":
        if not config.get("tie_word_embeddings", True):
            yield "a BERT whose head is not its word embedding"
        if (types := config.get("type_vocab_size", 2)) != 2:
            yield f"type_vocab_size={types} (only 2)"
        return
    if not config.get("scale_attn_weights", True):
        yield "scale_attn_weights=False"
    if config.get("scale_attn_by_inverse_layer_idx"):
        yield "scale_attn_by_inverse_layer_idx=True"


def _dropout(config: Mapping[str, Any], is_bert: bool) -> tuple[float, float]:
    """Of the hidden states and of the attention."""
    if is_bert:
        return config.get("hidden_dropout_prob", 0.1), config.get("attention_probs_dropout_prob", 0.1)
    residual, embedding = config.get("resid_pdrop", 0.1), config.get("embd_pdrop", 0.1)
    if residual != embedding:
        _logger.warning(
            "Megatron-LM has one rate for embd_pdrop=%s and resid_pdrop=%s; the latter is used.", embedding, residual
        )
    return residual, config.get("attn_pdrop", 0.1)
