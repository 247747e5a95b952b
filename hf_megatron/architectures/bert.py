"""BERT: how each of its tensors is cut, for both placements of its LayerNorms.

``pre`` is the paper's rearranged BERT, which transformers calls MegatronBert: the norm stands before attention and MLP,
the embeddings have none, and one follows the last layer. ``post`` is the original BERT. Linear layers are stored
``[out, in]``, so cutting the columns of the paper's ``A`` is ``Split(0)`` and cutting its rows is ``Split(1)``.

Source: Shoeybi et al. 2019, arXiv:1909.08053, sections 3 and 5.3, figure 7; names and shapes: transformers' Bert and
MegatronBert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hf_megatron.architectures.table import ModelClass, PartitionTable, TensorRule, integer_sizes, number_of_labels
from hf_megatron.errors import UnsupportedError
from hf_megatron.partition.spec import Replicated, Spec, Split, VocabSplit

# config.json may leave any of these out; the values are the stock configurations'.
_POST_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
_PRE_DEFAULTS = {
    **_POST_DEFAULTS,
    "vocab_size": 29056,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def _sizes(defaults: Mapping[str, int]) -> Callable[[Mapping[str, object]], dict[str, int]]:
    def sizes(config: Mapping[str, object]) -> dict[str, int]:
        values = integer_sizes(config, defaults)
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        if hidden % heads:
            raise UnsupportedError(
                f"hidden_size={hidden} is not divisible by num_attention_heads={heads}; every head must have the same "
                "size."
            )
        for flag in ("is_decoder", "add_cross_attention"):
            if config.get(flag):
                raise UnsupportedError(f"{flag}=True is not supported: the parallel BERT is an encoder only.")
        positions = config.get("position_embedding_type") or "absolute"
        if positions != "absolute":
            raise UnsupportedError(f"position_embedding_type={positions!r} is not supported; only 'absolute' is.")
        return {**values, "num_labels": number_of_labels(config), "two": 2, "one": 1}

    return sizes


# The names in a group mean the same function, within 3e-7.
_GELUS = (("gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_accurate"), ("gelu", "gelu_python"))


def _stock_mismatch(config: Mapping[str, object]) -> str | None:
    mlp, head = config.get("hidden_act", "gelu"), config.get("prediction_head_act")
    if head is None or head == mlp or any(mlp in group and head in group for group in _GELUS):
        return None
    size = " (up to 4.7e-4 in each activation, about 1e-3 in the logits)" if "gelu" in f"{mlp}" else ""
    return (
        f"The stock class has one activation, hidden_act={mlp!r}, and applies it in the masked-LM head too, where this "
        f"model has {head!r}{size}."
    )


def _weight_and_bias(
    name: str, weight: tuple[str, ...], weight_spec: Spec, bias_spec: Spec | None = None
) -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"{name}.weight", weight, weight_spec),
        TensorRule(f"{name}.bias", weight[:1], bias_spec or Replicated()),
    )


def _norm(name: str) -> tuple[TensorRule, ...]:
    return _weight_and_bias(name, ("hidden_size",), Replicated())


def _body(*, is_pre: bool) -> tuple[TensorRule, ...]:
    layer, square = "encoder.layer.*", ("hidden_size", "hidden_size")
    attention = f"{layer}.attention"
    return (
        TensorRule("embeddings.word_embeddings.weight", ("vocab_size", "hidden_size"), VocabSplit()),
        TensorRule("embeddings.position_embeddings.weight", ("max_position_embeddings", "hidden_size"), Replicated()),
        TensorRule("embeddings.token_type_embeddings.weight", ("type_vocab_size", "hidden_size"), Replicated()),
        *(() if is_pre else _norm("embeddings.LayerNorm")),
        *(_norm(f"{attention}.ln") if is_pre else ()),
        *_weight_and_bias(f"{attention}.self.query", square, Split(0), Split(0)),
        *_weight_and_bias(f"{attention}.self.key", square, Split(0), Split(0)),
        *_weight_and_bias(f"{attention}.self.value", square, Split(0), Split(0)),
        *_weight_and_bias(f"{attention}.output.dense", square, Split(1)),
        *_norm(f"{layer}.ln" if is_pre else f"{attention}.output.LayerNorm"),
        *_weight_and_bias(f"{layer}.intermediate.dense", ("intermediate_size", "hidden_size"), Split(0), Split(0)),
        *_weight_and_bias(f"{layer}.output.dense", ("hidden_size", "intermediate_size"), Split(1)),
        *(_norm("encoder.ln") if is_pre else _norm(f"{layer}.output.LayerNorm")),
        *_weight_and_bias("pooler.dense", square, Replicated()),
    )


# The transform before the decoder is small and stays whole; the decoder is the word embedding, its bias cut like it.
# An untied decoder has a bias of its own beside `predictions.bias`, which the stock classes then keep and do not use.
_MASKED_LM = (
    *_weight_and_bias("cls.predictions.transform.dense", ("hidden_size", "hidden_size"), Replicated()),
    *_norm("cls.predictions.transform.LayerNorm"),
    TensorRule("cls.predictions.bias", ("vocab_size",), VocabSplit()),
    TensorRule("cls.predictions.decoder.weight", ("vocab_size", "hidden_size"), VocabSplit()),
    TensorRule("cls.predictions.decoder.bias", ("vocab_size",), VocabSplit()),
)
_TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_SENTENCE_ORDER = _weight_and_bias("cls.seq_relationship", ("two", "hidden_size"), Replicated())
_CLASSIFIER = _weight_and_bias("classifier", ("num_labels", "hidden_size"), Replicated())
_CHOICE = _weight_and_bias("classifier", ("one", "hidden_size"), Replicated())
_SPAN = _weight_and_bias("qa_outputs", ("num_labels", "hidden_size"), Replicated())
_POOLER = ("pooler.dense.weight", "pooler.dense.bias")


def _classes(stock_prefix: str) -> tuple[ModelClass, ...]:
    def model_class(head: str, rules: tuple[TensorRule, ...], **options: object) -> ModelClass:
        return ModelClass(f"{stock_prefix}{head}", f"MegatronBert{head}", rules, **options)  # type: ignore[arg-type]

    return (
        model_class("ForPreTraining", (*_MASKED_LM, *_SENTENCE_ORDER), tied=_TIED),
        model_class("Model", (), has_prefix=False),
        model_class("ForMaskedLM", _MASKED_LM, tied=_TIED, without=_POOLER),
        model_class("ForSequenceClassification", _CLASSIFIER),
        model_class("ForMultipleChoice", _CHOICE),
        model_class("ForTokenClassification", _CLASSIFIER, without=_POOLER),
        model_class("ForQuestionAnswering", _SPAN, without=_POOLER),
    )


BERT_PRE = PartitionTable(
    architecture="bert",
    model_type="megatron_bert",
    stock_model_type="megatron-bert",
    own_config={"layernorm_placement": "pre"},
    base_prefix="bert",
    body=_body(is_pre=True),
    classes=_classes("MegatronBert"),
    word_embedding="embeddings.word_embeddings.weight",
    # Buffers of checkpoints from before transformers stopped saving them.
    obsolete=("embeddings.position_ids", "embeddings.token_type_ids"),
    sizes=_sizes(_PRE_DEFAULTS),
    stock_mismatch=_stock_mismatch,
)

BERT_POST = PartitionTable(
    architecture="bert",
    model_type="megatron_bert",
    stock_model_type="bert",
    own_config={"layernorm_placement": "post"},
    base_prefix="bert",
    body=_body(is_pre=False),
    classes=_classes("Bert"),
    word_embedding="embeddings.word_embeddings.weight",
    obsolete=("embeddings.position_ids", "embeddings.token_type_ids"),
    sizes=_sizes(_POST_DEFAULTS),
    stock_mismatch=_stock_mismatch,
)
