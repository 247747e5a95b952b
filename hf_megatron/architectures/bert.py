"""BERT, with both placements of its LayerNorms.

``pre`` is the paper's rearranged BERT, which transformers calls MegatronBert: the norm stands before attention and MLP,
the embeddings have none, and one follows the last layer. ``post`` is the original BERT. Linear layers are stored
``[out, in]``, so cutting the columns of the paper's ``A`` is ``Split(0)`` and cutting its rows is ``Split(1)``.

Source: Shoeybi et al. 2019, arXiv:1909.08053, sections 3 and 5.3, figure 7; names and shapes: transformers' Bert and
MegatronBert.
"""

from __future__ import annotations

from dataclasses import replace

from hf_megatron.architectures.table import Architecture, Field, MegatronLM, ModelClass, TensorRule, weight_and_bias
from hf_megatron.partition.spec import Replicated, Split, VocabSplit

_HIDDEN, _SQUARE, _WHOLE = ("hidden_size",), ("hidden_size", "hidden_size"), Replicated()
_LAYER, _ATTENTION = "encoder.layer.*", "encoder.layer.*.attention"
_QKV = "layers.*.self_attention.query_key_value"


def _size_fields(vocabulary: int, hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Field]:
    """With these defaults."""
    return {
        "vocab_size": Field("vocab_size", vocabulary),
        "num_positions": Field("max_position_embeddings", 512),
        "hidden_size": Field("hidden_size", hidden),
        "num_hidden_layers": Field("num_hidden_layers", layers),
        "num_attention_heads": Field("num_attention_heads", heads),
        "intermediate_size": Field("intermediate_size", intermediate),
        "num_token_types": Field("type_vocab_size", 2),
    }


def _body(*, is_pre: bool) -> tuple[TensorRule, ...]:
    """Of each module: name, name in Megatron-LM, shape, cut of the weight, cut of the bias.

    In Megatron-LM's post-norm BERT every norm is a slot later than in the original: the first one follows the
    embeddings, and the one before the next layer's attention follows this layer's MLP.
    """
    words, positions, types = (f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type"))
    up, down = ("intermediate_size", "hidden_size"), ("hidden_size", "intermediate_size")
    second = f"{_LAYER}.ln" if is_pre else f"{_ATTENTION}.output.LayerNorm"
    last = ("encoder.ln", "final_layernorm") if is_pre else (f"{_LAYER}.output.LayerNorm", "layers.+.input_layernorm")
    embedding_norm = weight_and_bias("embeddings.LayerNorm", "layers.0.input_layernorm", _HIDDEN, _WHOLE)
    attention_norm = weight_and_bias(f"{_ATTENTION}.ln", "layers.*.input_layernorm", _HIDDEN, _WHOLE)
    return (
        *weight_and_bias(words, "word_embeddings", ("vocab_size", "hidden_size"), VocabSplit(), None),
        *weight_and_bias(positions, "position_embeddings", ("num_positions", "hidden_size"), _WHOLE, None),
        *weight_and_bias(types, "tokentype_embeddings", ("num_token_types", "hidden_size"), _WHOLE, None),
        *(attention_norm if is_pre else embedding_norm),
        *weight_and_bias(f"{_ATTENTION}.self.query", _QKV, _SQUARE, Split(0), Split(0), qkv=0),
        *weight_and_bias(f"{_ATTENTION}.self.key", _QKV, _SQUARE, Split(0), Split(0), qkv=1),
        *weight_and_bias(f"{_ATTENTION}.self.value", _QKV, _SQUARE, Split(0), Split(0), qkv=2),
        *weight_and_bias(f"{_ATTENTION}.output.dense", "layers.*.self_attention.dense", _SQUARE, Split(1)),
        *weight_and_bias(second, "layers.*.post_attention_layernorm", _HIDDEN, _WHOLE),
        *weight_and_bias(f"{_LAYER}.intermediate.dense", "layers.*.mlp.dense_h_to_4h", up, Split(0), Split(0)),
        *weight_and_bias(f"{_LAYER}.output.dense", "layers.*.mlp.dense_4h_to_h", down, Split(1)),
        *weight_and_bias(*last, _HIDDEN, _WHOLE),
        *weight_and_bias("pooler.dense", "pooler.dense", _SQUARE, _WHOLE),
    )


# The transform before the decoder is small and stays whole; the decoder is the word embedding, its bias cut like it.
# An untied decoder has a bias of its own beside `predictions.bias`, which the stock classes then keep and do not use.
_MASKED_LM = (
    *weight_and_bias("cls.predictions.transform.dense", "lm_head.dense", _SQUARE, _WHOLE),
    *weight_and_bias("cls.predictions.transform.LayerNorm", "lm_head.layernorm", _HIDDEN, _WHOLE),
    TensorRule("cls.predictions.bias", ("vocab_size",), VocabSplit(), "lm_head.bias"),
    TensorRule("cls.predictions.decoder.weight", ("vocab_size", "hidden_size"), VocabSplit(), "output_layer.weight"),
    TensorRule("cls.predictions.decoder.bias", ("vocab_size",), VocabSplit(), "lm_head.bias"),
)
_TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_ORDER = weight_and_bias("cls.seq_relationship", "binary_head", (2, "hidden_size"), _WHOLE)
_CLASSIFIER = weight_and_bias("classifier", None, ("num_labels", "hidden_size"), _WHOLE)
_CHOICE = weight_and_bias("classifier", None, (1, "hidden_size"), _WHOLE)
_SPAN = weight_and_bias("qa_outputs", None, ("num_labels", "hidden_size"), _WHOLE)
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


_DROPOUT = Field("hidden_dropout_prob", 0.1)
_ENCODER_ONLY = "the parallel BERT is an encoder only"
_MEGATRON = MegatronLM(
    only=("lm_head.", "binary_head.", "pooler.", "tokentype_"),
    tokenizer="BertWordPieceLowerCase",
    required={"tie_word_embeddings": True, "type_vocab_size": 2},
    ties_head=True,
)

BERT_POST = Architecture(
    name="bert",
    model_type="megatron_bert",
    stock_model_type="bert",
    own_config={"layernorm_placement": "post"},
    config_class="MegatronBertConfig",
    base_prefix="bert",
    is_causal=False,
    norms="post",
    size_fields=_size_fields(30522, 768, 12, 12, 3072),
    activation=Field("hidden_act", "gelu"),
    head_activation="prediction_head_act",
    epsilon=Field("layer_norm_eps", 1e-12),
    dropouts=(_DROPOUT, Field("attention_probs_dropout_prob", 0.1), _DROPOUT),
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
    megatron=_MEGATRON,
)

BERT_PRE = replace(
    BERT_POST,
    stock_model_type="megatron-bert",
    own_config={"layernorm_placement": "pre"},
    norms="pre",
    size_fields=_size_fields(29056, 1024, 24, 16, 4096),
    body=_body(is_pre=True),
    classes=_classes("MegatronBert"),
    # transformers writes Bert's epsilon for this model too, which Megatron-LM was not trained with.
    megatron=replace(_MEGATRON, unchosen_epsilon=1e-12),
)
