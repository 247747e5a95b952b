"""GPT-2: how each of its tensors is cut.

GPT-2's linear layers are stored ``[in, out]`` (transformers' Conv1D), so cutting the columns of the paper's ``A`` is
``Split(1)`` and cutting its rows is ``Split(0)``.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3 and figure 3; names and shapes: transformers' GPT-2.
"""

from __future__ import annotations

from collections.abc import Mapping

from hf_megatron.architectures.table import ModelClass, PartitionTable, TensorRule, integer_sizes, number_of_labels
from hf_megatron.errors import UnsupportedError
from hf_megatron.partition.spec import FusedSplit, Replicated, Split, VocabSplit

# config.json may leave any of these out; the values are the stock GPT2Config's.
_DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
# Both spellings are accepted by the stock config.
_ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}


def _sizes(config: Mapping[str, object]) -> dict[str, int]:
    values = integer_sizes(config, _DEFAULTS, _ALIASES)
    hidden = values["n_embd"]
    if hidden % values["n_head"]:
        raise UnsupportedError(
            f"hidden_size={hidden} is not divisible by num_attention_heads={values['n_head']}; every head must have "
            "the same size."
        )
    if config.get("add_cross_attention"):
        raise UnsupportedError("add_cross_attention=True is not supported: the parallel GPT-2 is a decoder only.")
    return {
        "vocab_size": values["vocab_size"],
        "num_positions": values["n_positions"],
        "hidden_size": hidden,
        "query_key_value": 3 * hidden,
        "intermediate_size": 4 * hidden
        if config.get("n_inner") is None
        else integer_sizes(config, {"n_inner": 0})["n_inner"],
        "num_hidden_layers": values["n_layer"],
        "num_attention_heads": values["n_head"],
        "num_labels": number_of_labels(config),
        "start_and_end": 2,
    }


def _norm(name: str) -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"{name}.weight", ("hidden_size",), Replicated()),
        TensorRule(f"{name}.bias", ("hidden_size",), Replicated()),
    )


_BODY = (
    TensorRule("wte.weight", ("vocab_size", "hidden_size"), VocabSplit()),
    TensorRule("wpe.weight", ("num_positions", "hidden_size"), Replicated()),
    *_norm("h.*.ln_1"),
    # Q | K | V side by side, each cut by heads.
    TensorRule("h.*.attn.c_attn.weight", ("hidden_size", "query_key_value"), FusedSplit(1, num_blocks=3)),
    # Held whole, because a strided cut of dim 0 does not survive FSDP's own cut of dim 0 (torch 2.13: wrong gradients).
    TensorRule("h.*.attn.c_attn.bias", ("query_key_value",), Replicated(used=FusedSplit(0, num_blocks=3))),
    TensorRule("h.*.attn.c_proj.weight", ("hidden_size", "hidden_size"), Split(0)),
    TensorRule("h.*.attn.c_proj.bias", ("hidden_size",), Replicated()),
    *_norm("h.*.ln_2"),
    TensorRule("h.*.mlp.c_fc.weight", ("hidden_size", "intermediate_size"), Split(1)),
    TensorRule("h.*.mlp.c_fc.bias", ("intermediate_size",), Split(0)),
    TensorRule("h.*.mlp.c_proj.weight", ("intermediate_size", "hidden_size"), Split(0)),
    TensorRule("h.*.mlp.c_proj.bias", ("hidden_size",), Replicated()),
    *_norm("ln_f"),
)

_LM_HEAD = (TensorRule("lm_head.weight", ("vocab_size", "hidden_size"), VocabSplit()),)
_SEQUENCE = (TensorRule("score.weight", ("num_labels", "hidden_size"), Replicated()),)
_TOKEN = (
    TensorRule("classifier.weight", ("num_labels", "hidden_size"), Replicated()),
    TensorRule("classifier.bias", ("num_labels",), Replicated()),
)
_QUESTION = (
    TensorRule("qa_outputs.weight", ("start_and_end", "hidden_size"), Replicated()),
    TensorRule("qa_outputs.bias", ("start_and_end",), Replicated()),
)

GPT2 = PartitionTable(
    architecture="gpt2",
    model_type="megatron_gpt2",
    stock_model_type="gpt2",
    base_prefix="transformer",
    body=_BODY,
    classes=(
        ModelClass("GPT2LMHeadModel", "MegatronGPT2LMHeadModel", _LM_HEAD, tied={"lm_head.weight": "wte.weight"}),
        ModelClass("GPT2Model", "MegatronGPT2Model", has_prefix=False),
        ModelClass("GPT2ForSequenceClassification", "MegatronGPT2ForSequenceClassification", _SEQUENCE),
        ModelClass("GPT2ForTokenClassification", "MegatronGPT2ForTokenClassification", _TOKEN),
        ModelClass("GPT2ForQuestionAnswering", "MegatronGPT2ForQuestionAnswering", _QUESTION),
    ),
    word_embedding="wte.weight",
    # The causal mask and its fill value, buffers of every GPT-2 saved before transformers stopped keeping them.
    obsolete=("h.*.attn.bias", "h.*.attn.masked_bias"),
    sizes=_sizes,
)
