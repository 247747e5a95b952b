"""BERT, with both placements of its LayerNorms.

``pre`` is the paper's rearranged BERT, which transformers calls MegatronBert: the norm stands before attention and MLP,
the embeddings have none, and one follows the last layer. ``post`` is the original BERT. Linear layers are stored
``[out, in]``, so cutting the columns of the paper's ``A`` is ``Split(0)`` and cutting its rows is ``Split(1)``.

Source: Shoeybi et al. 2019, arXiv:1909.08053, sections 3 and 5.3, figure 7; names and shapes: transformers' Bert and
MegatronBert.
"""

from __future__ import annotations

from dataclasses import replace

from hf_megatron.architectures.table import (
    Architecture,
    Field,
    MegatronLM,
    ModelClass,
    TensorRule,
    weight_and_bias,
)
from hf_megatron.partition.spec import Replicated, Split, VocabSplit

_HIDDEN, _SQUARE, _WHOLE = ("hidden_size",), ("hidden_size", "hidden_size"), Replicated()
_ATTENTION, _QKV = "encoder.layer.*.attention", "layers.*.self_attention.query_key_value"


def _norm(name: str, megatron: str) -> tuple[TensorRule, ...]:
    return weight_and_bias(name, _HIDDEN, _WHOLE, megatron=megatron)


def _body(*, is_pre: bool) -> tuple[TensorRule, ...]:
    """The base model. In Megatron-LM's post-norm BERT every norm is a slot later than in the original: the first one
    follows the embeddings, and the one before the next layer's attention follows this layer's MLP.
    """
    first, second = "layers.*.input_layernorm", "layers.*.post_attention_layernorm"
    after_embeddings = () if is_pre else _norm("embeddings.LayerNorm", "layers.0.input_layernorm")
    before_attention = _norm(f"{_ATTENTION}.ln", first) if is_pre else ()
    before_mlp = _norm("encoder.layer.*.ln" if is_pre else f"{_ATTENTION}.output.LayerNorm", second)
    last = (
        _norm("encoder.ln", "final_layernorm")
        if is_pre
        else _norm("encoder.layer.*.output.LayerNorm", "layers.+.input_layernorm")
    )
    words, positions, types = (f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type"))
    up, down = ("intermediate_size", "hidden_size"), ("hidden_size", "intermediate_size")
    up_name, down_name = "layers.*.mlp.dense_h_to_4h", "layers.*.mlp.dense_4h_to_h"
    return (
        *weight_and_bias(words, ("vocab_size", "hidden_size"), VocabSplit(), None, megatron="word_embeddings"),
        *weight_and_bias(positions, ("num_positions", "hidden_size"), _WHOLE, None, megatron="position_embeddings"),
        *weight_and_bias(types, ("num_token_types", "hidden_size"), _WHOLE, None, megatron="tokentype_embeddings"),
        *after_embeddings,
        *before_attention,
        *weight_and_bias(f"{_ATTENTION}.self.query", _SQUARE, Split(0), Split(0), megatron=_QKV, qkv=0),
        *weight_and_bias(f"{_ATTENTION}.self.key", _SQUARE, Split(0), Split(0), megatron=_QKV, qkv=1),
        *weight_and_bias(f"{_ATTENTION}.self.value", _SQUARE, Split(0), Split(0), megatron=_QKV, qkv=2),
        *weight_and_bias(f"{_ATTENTION}.output.dense", _SQUARE, Split(1), megatron="layers.*.self_attention.dense"),
        *before_mlp,
        *weight_and_bias("encoder.layer.*.intermediate.dense", up, Split(0), Split(0), megatron=up_name),
        *weight_and_bias("encoder.layer.*.output.dense", down, Split(1), megatron=down_name),
        *last,
        *weight_and_bias("pooler.dense", _SQUARE, _WHOLE, megatron="pooler.dense"),
    )


# The transform before the decoder is small and stays whole; the decoder is the word embedding, its bias cut like it.
# An untied decoder has a bias of its own beside `predictions.bias`, which the stock classes then keep and do not use.
_MASKED_LM = (
    *weight_and_bias("cls.predictions.transform.dense", _SQUARE, _WHOLE, megatron="lm_head.dense"),
    *_norm("cls.predictions.transform.LayerNorm", "lm_head.layernorm"),
    TensorRule("cls.predictions.bias", ("vocab_size",), VocabSplit(), "lm_head.bias"),
    TensorRule("cls.predictions.decoder.weight", ("vocab_size", "hidden_size"), VocabSplit(), "output_layer.weight"),
    TensorRule("cls.predictions.decoder.bias", ("vocab_size",), VocabSplit(), "lm_head.bias"),
)
_TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_ORDER = weight_and_bias("cls.seq_relationship", (2, "hidden_size"), _WHOLE, megatron="binary_head")
_CLASSIFIER = weight_and_bias("classifier", ("num_labels", "hidden_size"), _WHOLE)
_CHOICE = weight_and_bias("classifier", (1, "hidden_size"), _WHOLE)
_SPAN = weight_and_bias("qa_outputs", ("num_labels", "hidden_size"), _WHOLE)
_POOLER = ("pooler.dense.weight", "pooler.dense.bias")


def _classes(stock: str) -> tuple[ModelClass, ...]:
    ours = "MegatronBert"
    return (
        ModelClass(f"{stock}ForPreTraining", f"{ours}ForPreTraining", (*_MASKED_LM, *_ORDER), tied=_TIED),
        ModelClass(f"{stock}Model", f"{ours}Model", has_prefix=False),
        ModelClass(f"{stock}ForMaskedLM", f"{ours}ForMaskedLM", _MASKED_LM, tied=_TIED, without=_POOLER),
        ModelClass(f"{stock}ForSequenceClassification", f"{ours}ForSequenceClassification", _CLASSIFIER),
        ModelClass(f"{stock}ForMultipleChoice", f"{ours}ForMultipleChoice", _CHOICE),
        ModelClass(f"{stock}ForTokenClassification", f"{ours}ForTokenClassification", _CLASSIFIER, without=_POOLER),
        ModelClass(f"{stock}ForQuestionAnswering", f"{ours}ForQuestionAnswering", _SPAN, without=_POOLER),
    )


_ENCODER_ONLY = "the parallel BERT is an encoder only"

BERT_POST = Architecture(
    name="bert",
    model_type="megatron_bert",
    stock_model_type="bert",
    own_config={"layernorm_placement": "post"},
    config_class="MegatronBertConfig",
    base_prefix="bert",
    is_causal=False,
    norms="post",
    size_fields={
        "vocab_size": Field("vocab_size", 30522),
        "num_positions": Field("max_position_embeddings", 512),
        "hidden_size": Field("hidden_size", 768),
        "num_hidden_layers": Field("num_hidden_layers", 12),
        "num_attention_heads": Field("num_attention_heads", 12),
        "intermediate_size": Field("intermediate_size", 3072),
        "num_token_types": Field("type_vocab_size", 2),
    },
    activation=Field("hidden_act", "gelu"),
    head_activation="prediction_head_act",
    epsilon=Field("layer_norm_eps", 1e-12),
    dropouts=(
        Field("hidden_dropout_prob", 0.1),
        Field("attention_probs_dropout_prob", 0.1),
        Field("hidden_dropout_prob", 0.1),
    ),
    required={
        "is_decoder": (False, _ENCODER_ONLY),
        "add_cross_attention": (False, _ENCODER_ONLY),
        "position_embedding_type": ("absolute", "only 'absolute' is"),
    },
    body=_body(is_pre=False),
    classes=_classes("Bert"),
    word_embedding="embeddings.word_embeddings.weight",
    # Buffers of checkpoints from before transformers stopped saving them.
    obsolete=("embeddings.position_ids", "embeddings.token_type_ids"),
    megatron=MegatronLM(
        only=("lm_head.", "binary_head.", "pooler.", "tokentype_"),
        tokenizer="BertWordPieceLowerCase",
        required={"tie_word_embeddings": True, "type_vocab_size": 2},
        ties_head=True,
    ),
)

assert BERT_POST.megatron is not None
BERT_PRE = replace(
    BERT_POST,
    stock_model_type="megatron-bert",
    own_config={"layernorm_placement": "pre"},
    norms="pre",
    size_fields={
        **BERT_POST.size_fields,
        "vocab_size": Field("vocab_size", 29056),
        "hidden_size": Field("hidden_size", 1024),
        "num_hidden_layers": Field("num_hidden_layers", 24),
        "num_attention_heads": Field("num_attention_heads", 16),
        "intermediate_size": Field("intermediate_size", 4096),
    },
    body=_body(is_pre=True),
    classes=_classes("MegatronBert"),
    # transformers writes Bert's epsilon for this model too, which Megatron-LM was not trained with.
    megatron=replace(BERT_POST.megatron, unchosen_epsilon=1e-12),
)
