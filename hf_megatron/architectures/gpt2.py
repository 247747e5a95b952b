"""GPT-2.

Its linear layers are stored ``[in, out]`` (transformers' Conv1D), so cutting the columns of the paper's ``A`` is
``Split(1)`` and cutting its rows is ``Split(0)``.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3 and figure 3; names and shapes: transformers' GPT-2.
"""

from __future__ import annotations

from typing import Any

from hf_megatron.architectures.table import Architecture, Field, MegatronLM, ModelClass, TensorRule, weight_and_bias
from hf_megatron.partition.spec import FusedSplit, Replicated, Spec, Split, VocabSplit

_HIDDEN, _LABELS, _WHOLE = ("hidden_size",), ("num_labels", "hidden_size"), Replicated()


def _linear(
    module: str, megatron: str, sizes: tuple[str, str], weight: Spec, bias: Spec = _WHOLE
) -> tuple[TensorRule, ...]:
    return weight_and_bias(f"h.*.{module}", f"layers.*.{megatron}", sizes, weight, bias, is_transposed=True)


def _class(name: str, head: tuple[TensorRule, ...] = (), **options: Any) -> ModelClass:
    return ModelClass(f"GPT2{name}", f"MegatronGPT2{name}", head, **options)


_LM_HEAD = weight_and_bias("lm_head", "output_layer", ("vocab_size", "hidden_size"), VocabSplit(), None)

GPT2 = Architecture(
    name="gpt2",
    model_type="megatron_gpt2",
    stock_model_type="gpt2",
    config_class="MegatronGPT2Config",
    base_prefix="transformer",
    is_causal=True,
    norms="pre",
    size_fields={
        "vocab_size": Field("vocab_size", 50257),
        "num_positions": Field("n_positions", 1024, "max_position_embeddings"),
        "hidden_size": Field("n_embd", 768, "hidden_size"),
        "num_hidden_layers": Field("n_layer", 12, "num_hidden_layers"),
        "num_attention_heads": Field("n_head", 12, "num_attention_heads"),
        "intermediate_size": Field("n_inner", None),
    },
    activation=Field("activation_function", "gelu_new"),
    epsilon=Field("layer_norm_epsilon", 1e-5),
    dropouts=(Field("embd_pdrop", 0.1), Field("attn_pdrop", 0.1), Field("resid_pdrop", 0.1)),
    functional=("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
    required={"add_cross_attention": (False, "the parallel GPT-2 is a decoder only")},
    # Module, its name in Megatron-LM, shape, cut of the weight, cut of the bias.
    body=(
        *weight_and_bias("wte", "word_embeddings", ("vocab_size", "hidden_size"), VocabSplit(), None),
        *weight_and_bias("wpe", "position_embeddings", ("num_positions", "hidden_size"), _WHOLE, None),
        *weight_and_bias("h.*.ln_1", "layers.*.input_layernorm", _HIDDEN, _WHOLE),
        *_linear(
            "attn.c_attn",
            "self_attention.query_key_value",
            ("hidden_size", "query_key_value"),
            FusedSplit(1, num_blocks=3),  # Q | K | V side by side, each cut by heads
            # Held whole: a strided cut of dim 0 does not survive FSDP's own cut of it (torch 2.13: wrong gradients).
            Replicated(used=FusedSplit(0, num_blocks=3)),
        ),
        *_linear("attn.c_proj", "self_attention.dense", ("hidden_size", "hidden_size"), Split(0)),
        *weight_and_bias("h.*.ln_2", "layers.*.post_attention_layernorm", _HIDDEN, _WHOLE),
        *_linear("mlp.c_fc", "mlp.dense_h_to_4h", ("hidden_size", "intermediate_size"), Split(1), Split(0)),
        *_linear("mlp.c_proj", "mlp.dense_4h_to_h", ("intermediate_size", "hidden_size"), Split(0)),
        *weight_and_bias("ln_f", "final_layernorm", _HIDDEN, _WHOLE),
    ),
    classes=(
        _class("LMHeadModel", _LM_HEAD, tied={"lm_head.weight": "wte.weight"}),
        _class("Model", has_prefix=False),
        _class("ForSequenceClassification", weight_and_bias("score", None, _LABELS, _WHOLE, None)),
        _class("ForTokenClassification", weight_and_bias("classifier", None, _LABELS, _WHOLE)),
        _class("ForQuestionAnswering", weight_and_bias("qa_outputs", None, (2, "hidden_size"), _WHOLE)),
    ),
    word_embedding="wte.weight",
    # The causal mask and its fill value, buffers of every GPT-2 saved before transformers stopped keeping them.
    obsolete=("h.*.attn.bias", "h.*.attn.masked_bias"),
    megatron=MegatronLM(
        only=(),
        tokenizer="GPT2BPETokenizer",
        required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
)
