"""Model cards from a configuration: what can be said of a model without its weights, in the Hub's format.

The template is ``templates/model_card.md``; ``convert`` fills it in for a checkpoint that comes without a card, and
``model_cards/generate.py`` for the paper's models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from hf_megatron.architectures import table_for
from hf_megatron.errors import UnsupportedError
from hf_megatron.planning import PRECISIONS, MemoryPlan, ModelShape, Run, plan_memory
from hf_megatron.planning.memory import local_numel

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"

_DEGREES = (1, 2, 4, 8)
_PIPELINES = {
    "LMHeadModel": "text-generation",
    "ForPreTraining": "fill-mask",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "Model": "feature-extraction",
}
_WIKITEXT = "`hf-megatron evaluate wikitext103 MODEL --data wiki.test.tokens`"
_LAMBADA = "`hf-megatron evaluate lambada MODEL --data lambada_test.jsonl`"


def card_text(
    config: Mapping[str, Any],
    *,
    title: str,
    summary: str,
    training: str = "Nothing is known of it here.",
    results: str = "Nothing was measured.",
    metadata: Sequence[str] = (),
) -> str:
    """A model card.

    Args:
        config: The model's config.json, ours or the stock one.
        title: Heading.
        summary: What this is, in a sentence or two.
        training: How it was trained, or is to be.
        results: What was measured; figures with their source.
        metadata: Further lines of the YAML header.
    """
    table = table_for(config)
    model_class = table.model_class((config.get("architectures") or [None])[0])
    pipeline = next(tag for suffix, tag in _PIPELINES.items() if model_class.stock.endswith(suffix))
    try:
        shape: ModelShape | None = ModelShape.from_config(config)
    except UnsupportedError:  # an activation that the planner does not know
        shape = None
    return TEMPLATE.read_text(encoding="utf-8").format(
        metadata="\n".join((*metadata, *_metadata(pipeline, table.name))),
        title=title,
        summary=summary,
        architecture=_rows_of_two(_architecture(config)),
        memory="Not planned for this activation function." if shape is None else _memory(shape),
        training=training,
        evaluation=f"{results}\n\n{_protocol(table.is_causal)}",
        intended_use=_intended_use(table.is_causal),
        limits=_limits(config),
    )


def _metadata(pipeline: str, architecture: str) -> Iterator[str]:
    yield "library_name: transformers"
    yield f"pipeline_tag: {pipeline}"
    yield "tags:"
    yield from (f"- {tag}" for tag in (architecture, "megatron-lm", "tensor-parallelism"))


def _architecture(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    table = table_for(config)
    model_class = table.model_class((config.get("architectures") or [None])[0])
    sizes = table.sizes(config)
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    number = sum(prod(tensor.shape) for tensor in table.tensors(config, model_class).values())
    yield "class", f"`{model_class.stock}` of transformers, `{model_class.ours}` of hf_megatron"
    yield "parameters", f"{number:,}"
    yield "layers", str(sizes["num_hidden_layers"])
    yield "hidden size", f"{hidden:,}"
    yield "attention heads", f"{heads} of {hidden // heads}"
    yield "inner size of the MLP", f"{sizes['intermediate_size']:,}"
    yield "activation", str(table.activation.read(config))
    yield "vocabulary", f"{sizes['vocab_size']:,}"
    yield "positions", f"{sizes['max_length']:,}"
    yield "LayerNorms", {"pre": "before attention and MLP", "post": "after attention and MLP"}[table.norms]
    yield "head", "tied to the embedding" if config.get("tie_word_embeddings", True) else "of its own"


def _memory(shape: ModelShape) -> str:
    """Bytes per rank, by degree: of the weights alone, and of training."""
    run = Run(sequence_length=shape.num_positions, precision=PRECISIONS["amp"], recompute="full")
    rows = []
    for tp_size in _DEGREES:
        candidate = replace(run, tp_size=tp_size)
        try:
            candidate.check(shape)
        except ValueError:
            continue
        weights = 2 * local_numel(shape, tp_size)[0]
        planned: MemoryPlan = plan_memory(shape, candidate)
        state = planned.parameters + planned.gradients + planned.optimizer
        rows.append([tp_size, *(f"{size / 1e9:.2f}" for size in (weights, state, planned.activations, planned.peak))])
    header = ["tensor-parallel degree", "weights in 16 bits", "weights, gradients, Adam", "activations", "peak"]
    explanation = (
        "GB on each rank. The last three columns are for training: float32 weights under 16-bit autocast, one sequence "
        f"of {shape.num_positions:,} tokens at a time, every layer recomputed in the backward pass. Planned, not "
        "measured; `hf-megatron plan` plans any other run."
    )
    return f"{_table(header, rows)}\n\n{explanation}"


def _protocol(is_causal: bool) -> str:
    if is_causal:
        return (
            f"The protocols of Shoeybi et al. 2019: WikiText-103 ({_WIKITEXT}), detokenised, windows of 1,024 tokens "
            "that advance by 32 with the loss on the last 32, perplexity normalised by the 245,566 original tokens of "
            f"the test set; LAMBADA ({_LAMBADA}), the last word with teacher forcing, right only if all of its "
            "sub-words are."
        )
    return (
        "The protocol of Shoeybi et al. 2019: fine-tuning on MNLI, QQP, SQuAD 1.1 and 2.0, and RACE, the median of "
        "five seeds on the development sets (RACE: test), with the metrics of `hf_megatron.paper.metrics`."
    )


def _intended_use(is_causal: bool) -> str:
    task = (
        "Generating and scoring text" if is_causal else "Fine-tuning on classification, question answering and the like"
    )
    return (
        f"{task}, and research on training large models: with stock transformers on one device, or cut over several "
        "with the classes of hf_megatron, which compute the same numbers."
    )


def _limits(config: Mapping[str, Any]) -> str:
    sizes = table_for(config).sizes(config)
    positions = sizes["max_length"]
    degrees = [d for d in range(1, sizes["num_attention_heads"] + 1) if sizes["num_attention_heads"] % d == 0]
    return (
        f"No more than {positions:,} tokens at a time; tensor-parallel degrees that divide the heads "
        f"({', '.join(map(str, degrees))}). A language model repeats what it was trained on, with its errors and "
        "biases; check what it says before anybody relies on it."
    )


def _rows_of_two(rows: Iterator[tuple[str, str]]) -> str:
    return _table(["", ""], list(rows))


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
