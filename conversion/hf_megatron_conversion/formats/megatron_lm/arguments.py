"""Megatron-LM's training arguments: what they say of the model, and what of it is not supported here.

Defaults and precedences changed over the years; what is absent from a file has the meaning it had when files did not
have it. Sources: ``megatron/arguments.py`` and ``megatron/model/transformer.py`` at v1.0, v2.0, v2.5 and 23.06, and
``core_transformer_config_from_args`` of Megatron-core.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_megatron.architectures import TABLES, Architecture
from hf_megatron.architectures.table import MegatronLM
from hf_megatron.errors import UnsupportedError
from hf_megatron_conversion.formats.megatron_lm.pickled import value_of

Arguments = Mapping[str, Any]

_SWITCHES = (
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "glu_activation",
    "gated_linear_unit",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "use_rotary_position_embeddings",
    "apply_layernorm_1p",
    "layernorm_zero_centered_gamma",  # the same since core 0.16
    "multi_latent_attention",
    "attention_output_gate",
    "experimental_attention_variant",
    "linear_attention_freq",
    "qk_layernorm",
    "qk_l2_norm",
    "softmax_scale",
    "window_size",
    "use_mup",
    "mtp_num_layers",
    "heterogeneous_layers_config_path",
    "enable_mhc_connections",
    "retro_add_retriever",
    "is_hybrid_model",
)
_FIXED: dict[str, tuple[object, ...]] = {
    "normalization": (None, "LayerNorm"),
    "add_bias_linear": (None, True),
    "add_position_embedding": (None, True),
    "position_embedding_type": (None, "learned_absolute"),
    "num_experts": (None, 0, 1, [1]),
    "num_moe_experts": (None, 0, 1),
    "softmax_type": (None, "vanilla"),
    "activation_func": (None, "gelu"),  # where Megatron-Bridge or NeMo has chosen it
    "bert_type": (None, "megatron"),  # of NeMo, whose other one has its norms after attention and MLP
    "standalone_embedding_stage": (None, False),
    "account_for_embedding_in_pipeline_split": (None, False),
    "account_for_loss_in_pipeline_split": (None, False),
}

# With these, Megatron-core has Transformer Engine compute the gelu, which has the tanh form only.
_TANH_IN_TRANSFORMER_ENGINE = ("use_te_activation_func", "use_transformer_engine_op_fuser")

# What tools/checkpoint/convert.py of Megatron-LM writes whatever the model was trained with.
_CONVERTED = {"no_save_optim": True, "use_cpu_initialization": True, "perform_initialization": False}
_logger = logging.getLogger(__name__)
_MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Activations:
    """Names of the activations, as transformers calls them."""

    mlp: str  # in every layer
    head: str  # in BERT's masked-LM head


def activations(arguments: Arguments | None, table: Architecture, *, is_core: bool) -> Activations:
    """Which of the gelus the model was trained with; Megatron-core (``is_core``) does not read the same switches."""
    if arguments is None and not is_core:  # from before v1.0, whose models had the stock ones' activations
        return Activations(table.activation.default, table.activation.default)
    arguments = {"bias_gelu_fusion": True} if arguments is None else arguments  # Megatron-core's default
    is_fused = bool(arguments.get("bias_gelu_fusion"))
    if is_core:
        is_tanh = is_fused or any(arguments.get(name) for name in _TANH_IN_TRANSFORMER_ENGINE)
        if not is_tanh and all(arguments.get(name) == value for name, value in _CONVERTED.items()):
            _logger.warning(
                "The arguments are those of Megatron-LM's tools/checkpoint, which says bias_gelu_fusion=False of any "
                "model, so the exact gelu is taken for its activation. If it was trained with the fused kernel, give a "
                "config.json (--config) with the tanh form."
            )
        return Activations("gelu_fast" if is_tanh else "gelu", "gelu")
    openai, onnx = bool(arguments.get("openai_gelu")), bool(arguments.get("onnx_safe"))
    head = "gelu_new" if openai else "gelu"
    # onnx_safe is the exact form with 1.41421 for the root of two, 1.2e-6 off. Until squared_relu came in 2022 the
    # fused kernel was used whatever else was asked for; since then only in the absence of anything else.
    fusion_wins = "squared_relu" not in arguments
    if is_fused and (fusion_wins or not (openai or onnx)):
        return Activations("gelu_fast", head)
    return Activations(head, head)


def architecture_of(stored: Iterable[str], arguments: Arguments, problems: list[str], *, is_core: bool) -> Architecture:
    """The table of a checkpoint, by what the names of its tensors begin with and by where its norms stand.

    ``problems`` is extended if no model is like that. Megatron-core has the norms first whatever the arguments say.
    """
    known = [(table, table.megatron.only) for table in TABLES if table.megatron is not None]
    named = [table for table, only in known if any(name.startswith(only) for name in stored)]
    named = named or [table for table, only in known if not only]
    name = "apply_residual_connection_post_layernorm"
    norms = "post" if arguments.get(name) and not is_core else "pre"
    placed = [table for table in named if table.norms == norms]
    if not placed:
        problems.append(f"{name} is not supported for {named[0].name}")
    return (placed or named)[0]


def megatron_of(table: Architecture) -> MegatronLM:
    """Megatron-LM's model of an architecture; UnsupportedError if it has none."""
    if table.megatron is None:
        known = dict.fromkeys(known.name for known in TABLES if known.megatron is not None)
        raise UnsupportedError(f"Megatron-LM has no {table.name} (only {', '.join(known)}).")
    return table.megatron


def unsupported(arguments: Arguments) -> Iterator[str]:
    """A line for each thing that the arguments ask for and that no stock model here has."""
    for name in _SWITCHES:
        if arguments.get(name):
            yield f"{name}={value_of(arguments[name])} is not supported"
    for name, allowed in _FIXED.items():
        if (value := arguments.get(name)) not in allowed:
            yield f"{name}={value_of(value)} is not supported (only {value_of(allowed[-1])})"
    heads, groups = arguments.get("num_attention_heads"), arguments.get("num_query_groups")
    if arguments.get("group_query_attention") and groups != heads:
        yield f"group_query_attention with num_query_groups={value_of(groups)} is not supported"
    hidden, channels = arguments.get("hidden_size"), arguments.get("kv_channels")
    if isinstance(heads, int) and isinstance(hidden, int) and isinstance(channels, int) and channels * heads != hidden:
        yield f"kv_channels={channels} times num_attention_heads={heads} is not hidden_size={hidden}"
    style = arguments.get("param_sharing_style")
    if _unique_layers(arguments) is not None and style not in ("grouped", "spaced"):
        yield f"param_sharing_style={value_of(style)} is not known (grouped, spaced)"


def _unique_layers(arguments: Arguments) -> int | None:
    unique, layers = arguments.get("num_unique_layers"), arguments.get("num_layers")
    return unique if isinstance(unique, int) and unique != layers else None


def stored_layers(arguments: Arguments, num_stored: int) -> list[int]:
    """For each layer the stored one, of ``num_stored``, whose parameters it has: its own, unless layers share them.

    In 2020 the arguments could ask for that.
    """
    unique, layers = _unique_layers(arguments), arguments.get("num_layers")
    if unique is None or unique != num_stored or not isinstance(layers, int) or not unique < layers <= _MAX_LAYERS:
        return list(range(num_stored))
    if arguments.get("param_sharing_style") == "grouped":
        return [layer % unique for layer in range(layers)]
    return [min(layer // (layers // unique), unique - 1) for layer in range(layers)]


def padded_vocab_size(vocab_size: int, divisor: int, tp_size: int) -> int:
    """The next multiple of ``divisor * tp_size``."""
    return -(-vocab_size // (divisor * tp_size)) * divisor * tp_size


def vocab_size_of(arguments: Arguments) -> int | None:
    """The vocabulary without padding, where the arguments say it; Megatron-LM's own mostly do not."""
    for name in ("orig_vocab_size", "true_vocab_size", "vocab_size"):
        value = arguments.get(name)
        if isinstance(value, int) and value > 0:
            # This tokenizer adds an end-of-document token to what it is told.
            is_null = name == "vocab_size" and arguments.get("tokenizer_type") == "NullTokenizer"
            return value + 1 if is_null else value
    return None
