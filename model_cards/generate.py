"""Write the cards of the paper's models, from the presets, the planner and the recipes.

    python model_cards/generate.py

No weights of these models are published with this package: the cards say how each is built, what it needs, how it is
trained and measured, and what the paper reports of it. A test compares them with what this script writes.

Source: Shoeybi et al. 2019, arXiv:1909.08053v4: tables 1 to 5, sections 4.2 and 5.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from hf_megatron.architectures.presets import PRESETS, Preset
from hf_megatron.paper.recipe import BERT_PRETRAINING, GPT2_PRETRAINING
from hf_megatron_conversion.card_text import TEMPLATE, card_text

_PAPER = "Shoeybi et al. 2019, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053)"

# Table 3: WikiText-103 perplexity, LAMBADA accuracy in percent.
_ZERO_SHOT = {"gpt2-355m": ("19.31", "45.18"), "gpt2-2.5b": ("12.76", "61.73"), "gpt2-8.3b": ("10.81", "66.51")}
# Table 5: MNLI m/mm; QQP; SQuAD 1.1 F1/EM; SQuAD 2.0 F1/EM; RACE test (middle/high).
_FINE_TUNED = {
    "bert-336m": ("89.7 / 90.0", "92.3", "94.2 / 88.0", "88.1 / 84.8", "83.0 (86.9 / 81.5)"),
    "bert-1.3b": ("90.9 / 91.0", "92.6", "94.9 / 89.1", "90.2 / 87.1", "87.3 (90.4 / 86.1)"),
    "bert-3.9b": ("91.4 / 91.4", "92.7", "95.5 / 90.0", "91.2 / 88.5", "89.5 (91.8 / 88.6)"),
}
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
    return card_text(
        preset.config,
        title=preset.name,
        summary=(
            f"One of the models of {_PAPER}: {_ROLES[preset.name]}. There are no weights here; this card tells how to "
            "build the model, what it needs, and how it is trained and measured.\n\n"
            f"```python\nconfig = {preset.table.config_class}"
            f'.from_preset("{preset.name}")\n```'
        ),
        training=_training(preset),
        results=_results(preset),
        metadata=("language: en", "license: apache-2.0"),
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
    """Write every card, and the template they share with converted checkpoints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="directory to write to")
    output = parser.parse_args().output
    for preset in PRESETS.values():
        (output / f"{preset.name}.md").write_text(card(preset), encoding="utf-8")
    (output / "template.md").write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main()
