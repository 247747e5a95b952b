"""GPT-2.

Its linear layers are stored ``[in, out]`` (transformers' Conv1D), so cutting the columns of the paper's ``A`` is
``Split(1)`` and cutting its rows is ``Split(0)``.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3 and figure 3; names and shapes: transformers' GPT-2.
"""

from __future__ import annotations

from hf_megatron.architectures.table import Architecture, Field, MegatronLM, ModelClass, weight_and_bias
from hf_megatron.partition.spec import FusedSplit, Replicated, Split, VocabSplit

_HIDDEN, _WHOLE = ("hidden_size",), Replicated()

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
    body=(
        *weight_and_bias("wte", ("vocab_size", "hidden_size"), VocabSplit(), None, megatron="word_embeddings"),
        *weight_and_bias("wpe", ("num_positions", "hidden_size"), _WHOLE, None, megatron="position_embeddings"),
        *weight_and_bias("h.*.ln_1", _HIDDEN, _WHOLE, megatron="layers.*.input_layernorm"),
        *weight_and_bias(
            "h.*.attn.c_attn",
            ("hidden_size", "query_key_value"),
            FusedSplit(1, num_blocks=3),  # Q | K | V side by side, each cut by heads
            # Held whole: a strided cut of dim 0 does not survive FSDP's own cut of it (torch 2.13: wrong gradients).
            Replicated(used=FusedSplit(0, num_blocks=3)),
            megatron="layers.*.self_attention.query_key_value",
            is_transposed=True,
        ),
        *weight_and_bias(
            "h.*.attn.c_proj",
            ("hidden_size", "hidden_size"),
            Split(0),
            megatron="layers.*.self_attention.dense",
            is_transposed=True,
        ),
        *weight_and_bias("h.*.ln_2", _HIDDEN, _WHOLE, megatron="layers.*.post_attention_layernorm"),
        *weight_and_bias(
            "h.*.mlp.c_fc",
            ("hidden_size", "intermediate_size"),
            Split(1),
            Split(0),
            megatron="layers.*.mlp.dense_h_to_4h",
            is_transposed=True,
        ),
        *weight_and_bias(
            "h.*.mlp.c_proj",
            ("intermediate_size", "hidden_size"),
            Split(0),
            megatron="layers.*.mlp.dense_4h_to_h",
            is_transposed=True,
        ),
        *weight_and_bias("ln_f", _HIDDEN, _WHOLE, megatron="final_layernorm"),
    ),
    classes=(
        ModelClass(
            "GPT2LMHeadModel",
            "MegatronGPT2LMHeadModel",
            weight_and_bias("lm_head", ("vocab_size", "hidden_size"), VocabSplit(), None, megatron="output_layer"),
            tied={"lm_head.weight": "wte.weight"},
        ),
        ModelClass("GPT2Model", "MegatronGPT2Model", has_prefix=False),
        ModelClass(
            "GPT2ForSequenceClassification",
            "MegatronGPT2ForSequenceClassification",
            weight_and_bias("score", ("num_labels", "hidden_size"), _WHOLE, None),
        ),
        ModelClass(
            "GPT2ForTokenClassification",
            "MegatronGPT2ForTokenClassification",
            weight_and_bias("classifier", ("num_labels", "hidden_size"), _WHOLE),
        ),
        ModelClass(
            "GPT2ForQuestionAnswering",
            "MegatronGPT2ForQuestionAnswering",
            weight_and_bias("qa_outputs", (2, "hidden_size"), _WHOLE),
        ),
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
