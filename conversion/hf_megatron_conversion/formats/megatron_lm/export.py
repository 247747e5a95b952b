"""From a config.json to Megatron-LM's training arguments, or to a list of what they cannot say."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from typing import Any

from hf_megatron.architectures.table import ERF_GELUS, TANH_GELUS
from hf_megatron.checkpoint import DTYPES, listed
from hf_megatron.errors import UnsupportedError, shown
from hf_megatron_conversion.formats.base import Model, Target
from hf_megatron_conversion.formats.megatron_lm.arguments import megatron_of
from hf_megatron_conversion.formats.megatron_lm.layout import DIVISOR, Layout
from hf_megatron_conversion.tensors import Readable
from hf_megatron_conversion.torch_pickle import GlobalName

# What Megatron-LM trains in, and torch.save has a type of storage for.
_FLOATS = ("F64", "F32", "F16", "BF16")

_logger = logging.getLogger(__name__)


def require_expressible(model: Model, tensors: Mapping[str, Readable], *, is_core: bool = False) -> None:
    """Raise UnsupportedError with everything of a model that Megatron-LM's models cannot compute.

    With ``is_core`` those are Megatron-core's, of which a BERT's norms stand before attention and MLP, and its head has
    the exact gelu.
    """
    table = model.table
    mlp, head = table.activations(model.config)
    required, gelus, problems = megatron_of(table).required, TANH_GELUS + ERF_GELUS, []
    if not model.model_class.is_language_model:
        problems.append(f"a {model.model_class.stock} (only language models)")
    if is_core and table.norms != "pre":
        problems.append(f"a {model.model_class.stock}, whose LayerNorms stand after attention and MLP (only before)")
    for name, value in (("activation", mlp), ("prediction_head_act", head)):
        if value not in gelus:
            problems.append(f"{name}={shown(value)} (only {', '.join(gelus)})")
    if is_core and table.head_activation is not None and head in TANH_GELUS:
        problems.append(f"{head} in the masked-LM head (only {', '.join(ERF_GELUS)})")
    elif mlp in ERF_GELUS and head in TANH_GELUS:
        problems.append(f"{mlp} in the layers with {head} in the head")
    if others := [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]:
        problems.append(f"tensors of other types than {', '.join(_FLOATS)}: {listed(others)}")
    for name, only in required.items():
        value = model.config.get(name, only)
        if (bool(value) if isinstance(only, bool) else value) != only:
            problems.append(f"{name}={shown(value)} (only {only})")
    if problems:
        whose = "Megatron-core" if is_core else "Megatron-LM"
        raise UnsupportedError(f"{whose} has no such model: {'; '.join(problems)}.")


def arguments_of(target: Target, layout: Layout) -> argparse.Namespace:
    """The arguments under which Megatron-LM's legacy models compute what the model computes."""
    return argparse.Namespace(**_arguments(target, layout))


def core_arguments_of(target: Target, layout: Layout) -> argparse.Namespace:
    """The arguments under which Megatron-core's models compute what the model computes.

    ``no_save_optim`` and ``no_save_rng`` say that there is no optimizer and no random state to be loaded.
    """
    mlp, _ = target.model.table.activations(target.model.config)
    changed = {
        "pipeline_model_parallel_size": target.pp_size,
        # The only gelu of the tanh form in Megatron-core is the fused one.
        "bias_gelu_fusion": mlp in TANH_GELUS,
        "openai_gelu": False,
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": False,  # apply_layernorm_1p until core 0.15
        "group_query_attention": False,
        "transformer_impl": target.transformer_impl,
        "use_mcore_models": True,
        "use_legacy_models": False,
        "ckpt_format": target.container,
        "use_dist_ckpt": target.container != "torch",
        "no_save_optim": True,
        "no_save_rng": True,
    }
    return argparse.Namespace(**_arguments(target, layout) | changed)


def _arguments(target: Target, layout: Layout) -> dict[str, Any]:
    """What of the arguments says what model it is, how it is cut, and in what precision it is trained."""
    model, dtype = target.model, next(iter(target.tensors.values())).dtype
    config, table, sizes = model.config, model.table, model.table.sizes(model.config)
    mlp, head = table.activations(config)
    # The fused kernel has the tanh form in the layers and leaves BERT's head the exact one; openai_gelu is both.
    is_fused = mlp in TANH_GELUS and (head in ERF_GELUS if table.head_activation else mlp == "gelu_fast")
    embedding_dropout, attention_dropout, hidden_dropout = (where.read(config) for where in table.dropouts)
    if embedding_dropout != hidden_dropout:
        names = table.dropouts[0].name, embedding_dropout, table.dropouts[2].name, hidden_dropout
        _logger.warning("Megatron-LM has one rate for %s=%s and %s=%s; the latter is used.", *names)
    hidden, heads, positions = (sizes[size] for size in ("hidden_size", "num_attention_heads", "num_positions"))
    epsilon = table.epsilon.read(config)
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
        "make_vocab_size_divisible_by": DIVISOR,
        "padded_vocab_size": layout.padded_vocab_size,
        "orig_vocab_size": sizes["vocab_size"],
        "tokenizer_type": megatron_of(table).tokenizer,
        "layernorm_epsilon": epsilon,
        "norm_epsilon": epsilon,
        "apply_layernorm_1p": False,
        "apply_residual_connection_post_layernorm": table.norms == "post",
        "apply_query_key_layer_scaling": False,
        "attention_softmax_in_fp32": True,
        "openai_gelu": mlp in TANH_GELUS and not is_fused,
        "onnx_safe": None,
        "bias_gelu_fusion": is_fused,
        "squared_relu": False,
        "swiglu": False,
        "add_bias_linear": True,
        "bert_binary_head": layout.has_binary_head,
        "num_experts": None,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        "hidden_dropout": hidden_dropout,
        "attention_dropout": attention_dropout,
        "init_method_std": config.get("initializer_range", 0.02),
        "fp16": dtype == "F16",
        "bf16": dtype == "BF16",
        "params_dtype": GlobalName("torch", DTYPES[dtype][1]),
        "tensor_model_parallel_size": target.tp_size,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "data_parallel_random_init": False,
        "iteration": 0,
    }
