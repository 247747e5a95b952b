"""Write the cards of the paper's models, from the presets, the planner and the recipes.

    python model_cards/generate.py

No weights of these models are published with this package: the cards say how each is built, what it needs, how it is
trained and measured, and what the paper reports of it. A test compares them with what this script writes.

Source: Shoeybi et al. 2019, arXiv:1909.08053v4: tables 1 to 5, sections 4.2 and 5.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_megatron.architectures import table_for
from hf_megatron.architectures.presets import PRESETS, Preset
from hf_megatron.paper.recipe import BERT_PRETRAINING, GPT2_PRETRAINING
from hf_megatron.planning import PRECISIONS, MemoryPlan, ModelShape, Run, plan_memory
from hf_megatron.planning.memory import local_numel
from hf_megatron_conversion.card import architecture_table, metadata, table

_HERE = Path(__file__).parent
_PAPER = "Shoeybi et al. 2019, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053)"

# Table 3: WikiText-103 perplexity, LAMBADA accuracy in percent.
_ZERO_SHOT = {"gpt2-355m": ("19.31", "45.18"), "gpt2-2.5b": ("12.76", "61.73"), "gpt2-8.3b": ("10.81", "66.51")}
# Table 5: MNLI m/mm; QQP; SQuAD 1.1 F1/EM; SQuAD 2.0 F1/EM; RACE test (middle/high).
_FINE_TUNED = {
    "bert-336m": ("89.7 / 90.0", "92.3", "94.2 / 88.0", "88.1 / 84.8", "83.0 (86.9 / 81.5)"),
    "bert-1.3b": ("90.9 / 91.0", "92.6", "94.9 / 89.1", "90.2 / 87.1", "87.3 (90.4 / 86.1)"),
    "bert-3.9b": ("91.4 / 91.4", "92.7", "95.5 / 90.0", "91.2 / 88.5", "89.5 (91.8 / 88.6)"),
}
_WIKITEXT = "`hf-megatron evaluate wikitext103 MODEL --data wiki.test.tokens`"
_LAMBADA = "`hf-megatron evaluate lambada MODEL --data lambada_test.jsonl`"
_DEGREES = (1, 2, 4, 8)
_ROLES: Mapping[str, str] = {
    "gpt2-355m": "the smallest GPT-2 it evaluates",
    "gpt2-1.2b": "the baseline of its scaling study, on one GPU",
    "gpt2-2.5b": "the second GPT-2 it evaluates, and the model of its scaling study for two GPUs",
    "gpt2-4.2b": "the model of its scaling study for four GPUs",
    "gpt2-8.3b": "the largest GPT-2 it evaluates, with heads of 128, cut over eight GPUs",
    "gpt2-8.3b-32heads": "the largest model of its scaling study, with heads of 96, cut over eight GPUs",
    "bert-336m": "the size of BERT-large, with the LayerNorms moved",
    "bert-1.3b": "the second of its BERTs",
    "bert-3.9b": "the largest of its BERTs",
}


def card(preset: Preset) -> str:
    """The card of a preset."""
    is_causal = preset.table.is_causal
    summary = (
        f"One of the models of {_PAPER}: {_ROLES[preset.name]}. There are no weights here; this card tells how to "
        "build the model, what it needs, and how it is trained and measured.\n\n"
        f"```python\nconfig = {preset.table.config_class}"
        f'.from_preset("{preset.name}")\n```'
    )
    return (
        (_HERE / "template.md")
        .read_text(encoding="utf-8")
        .format(
            metadata=f"language: en\nlicense: apache-2.0\n{metadata(preset.config)}",
            title=preset.name,
            summary=summary,
            architecture=architecture_table(preset.config),
            memory=_memory(ModelShape.from_config(preset.config)),
            training=_training(preset),
            evaluation=f"{_results(preset)}\n\n{_protocol(is_causal)}",
            intended_use=_intended_use(is_causal),
            limits=_limits(preset.config),
        )
    )


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
    return f"{table(header, rows)}\n\n{explanation}"


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


def _training(preset: Preset) -> str:
    is_causal = preset.table.is_causal
    recipe = GPT2_PRETRAINING if is_causal else BERT_PRETRAINING
    steps = 1_500_000 if preset.name == "bert-3.9b" else int(recipe.settings["max_steps"])
    warm_up = 3_000 if is_causal else 10_000
    schedule = "a cosine down to 1e-5" if is_causal else "a linear descent to zero"
    corpora = "Wikipedia, CC-Stories, RealNews and OpenWebText" + ("" if is_causal else " and BooksCorpus")
    task = (
        "predicting the next token of sequences of 1,024"
        if is_causal
        else "predicting masked words (whole-word n-grams) and the order of two sentences"
    )
    return (
        f"The paper's recipe (`hf_megatron.paper.recipe.{'GPT2' if is_causal else 'BERT'}_PRETRAINING`): {task}; "
        f"batches of {recipe.batch} sequences, {steps:,} steps; Adam, weight decay 0.01, learning rate "
        f"{recipe.settings['learning_rate']:g} after {warm_up:,} steps of warm-up, then {schedule}; gradients clipped "
        "at 1.0; dropout 0.1; mixed precision with a dynamic loss scale; weights from N(0, 0.02), those before a "
        f"residual addition scaled by 1/sqrt(2 x layers). Its data: {corpora}, 174 GB deduplicated."
    )


def _results(preset: Preset) -> str:
    if preset.name in _ZERO_SHOT:
        perplexity, accuracy = _ZERO_SHOT[preset.name]
        return (
            f"The paper reports, in its table 3: WikiText-103 perplexity {perplexity}, LAMBADA accuracy {accuracy}%. "
            "This package has not trained a model of this size."
        )
    if preset.name in _FINE_TUNED:
        names = ("MNLI m / mm", "QQP", "SQuAD 1.1 F1 / EM", "SQuAD 2.0 F1 / EM", "RACE (middle / high)")
        figures = zip(names, _FINE_TUNED[preset.name], strict=True)
        listed = "; ".join(f"{name} {value}" for name, value in figures)
        return f"The paper reports, in its table 5: {listed}. This package has not trained a model of this size."
    return "The paper measures its speed, not its quality, and this package has not trained a model of this size."


def main() -> None:
    """Write every card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=_HERE, help="directory to write to")
    output = parser.parse_args().output
    for preset in filter(lambda preset: preset.is_of_paper, PRESETS.values()):
        (output / f"{preset.name}.md").write_text(card(preset), encoding="utf-8")


if __name__ == "__main__":
    main()
