"""The paper's figure 7 in miniature: BERT with its LayerNorms after or before the residual, few layers and many.

    python -m benchmarks.bench_layernorm_placement            # trains, writes results/layernorm_placement.{json,png}
    python -m benchmarks.bench_layernorm_placement --redraw   # draws the data that is there
    python -m benchmarks.bench_layernorm_placement --quick    # a few steps, to see that it runs

What is measured, and what it does not show, is told in README.md beside this file.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import LambdaLR
from transformers import BertTokenizerFast, PreTrainedTokenizerBase

from benchmarks.command_line import make_parser, parse
from benchmarks.records import environment, read, write
from benchmarks.runs import run_all
from hf_megatron import MegatronBertConfig, MegatronBertForPreTraining
from hf_megatron.paper.data import DataCollatorForMegatronBertPretraining, sentence_order_pairs, tokenize_sentences

TITLES = {"post": "LayerNorm after each block (original BERT)", "pre": "LayerNorm before each block (the paper's BERT)"}
COLOURS = {"post": "tab:red", "pre": "tab:blue"}


@dataclass(frozen=True)
class Panel:
    """What one panel of the figure shows: so many layers, trained at this peak learning rate."""

    layers: int
    learning_rate: float


@dataclass(frozen=True)
class Setting:
    """Everything the trainings share; lengths in tokens, ``every`` in steps for a point of the curves."""

    panels: tuple[Panel, ...] = (Panel(4, 1e-3), Panel(24, 1e-3))
    seeds: tuple[int, ...] = (1, 2, 3)
    hidden: int = 64
    heads: int = 2
    # The paper's 0.02 belongs to a hidden size of 1024. A matrix of 64 x 64 does as much to its input with this one.
    initializer_range: float = 0.02 * (1024 / 64) ** 0.5
    vocab: int = 1024
    length: int = 32
    batch: int = 32
    steps: int = 600
    warm_up: int = 100
    every: int = 20


@dataclass(frozen=True)
class Run:
    """One training."""

    panel: Panel
    placement: str
    seed: int


QUICK = Setting(
    panels=(Panel(1, 1e-3), Panel(2, 1e-3)),
    seeds=(1,),
    hidden=16,
    vocab=300,
    length=16,
    batch=4,
    steps=6,
    warm_up=2,
    every=2,
)


def train_tokenizer(vocab: int) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer of the text that all runs learn from."""
    texts = [topics[name] for name in sorted(topics)]
    return BertTokenizerFast().train_new_from_iterator(texts, vocab, show_progress=False)


def batches(tokenizer: PreTrainedTokenizerBase, setting: Setting, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end; the same for both placements and every depth."""
    documents = [tokenize_sentences(tokenizer, topics[name]) for name in sorted(topics)]
    collate = DataCollatorForMegatronBertPretraining(tokenizer, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        pairs = list(sentence_order_pairs(documents, tokenizer, max_length=setting.length, generator=generator))
        order = torch.randperm(len(pairs), generator=generator)
        for chosen in order[: len(order) // setting.batch * setting.batch].split(setting.batch):
            yield collate([pairs[i] for i in chosen])


def train(run: Run, setting: Setting, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Train one model; returns its losses, means over every ``setting.every`` steps, and the CPU seconds it took."""
    torch.set_num_threads(1)
    started = time.process_time()
    config = MegatronBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=setting.hidden,
        num_hidden_layers=run.panel.layers,
        num_attention_heads=setting.heads,
        intermediate_size=4 * setting.hidden,
        max_position_embeddings=setting.length,
        layernorm_placement=run.placement,
        initializer_range=setting.initializer_range,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MegatronBertForPreTraining.from_config(config, seed=run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.panel.learning_rate, weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / setting.warm_up, 1 - step / setting.steps))
    losses = torch.zeros(setting.steps, 2)
    for step, batch in zip(range(setting.steps), batches(tokenizer, setting, run.seed), strict=False):
        output = model(**batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        order = F.cross_entropy(output.seq_relationship_logits.detach(), batch["sentence_order_label"])
        losses[step] = torch.stack([output.loss.detach() - order, order])
    means = losses.view(-1, setting.every, 2).mean(1)
    return {
        **dataclasses.asdict(run),
        "masked_lm_loss": [round(loss, 4) for loss in means[:, 0].tolist()],
        "sentence_order_loss": [round(loss, 4) for loss in means[:, 1].tolist()],
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def measure(setting: Setting, workers: int) -> dict[str, Any]:
    """All runs, ``workers`` at a time, each with one thread."""
    tokenizer = train_tokenizer(setting.vocab)
    wanted = [
        Run(panel, placement, seed)
        for panel in sorted(setting.panels, key=lambda panel: -panel.layers)  # so that none waits for a long one
        for seed in setting.seeds
        for placement in TITLES
    ]
    return {
        "setting": dataclasses.asdict(setting),
        "environment": {**environment("torch", "transformers"), "processes": workers},
        "runs": run_all(train, wanted, setting, tokenizer, workers=workers),
    }


def draw(results: dict[str, Any], file: Path) -> None:
    """A panel for each depth and learning rate, a line for each training."""
    setting = results["setting"]
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(setting["panels"]), sharey=True), setting["panels"], strict=True):
        for run in (run for run in results["runs"] if run["panel"] == panel):
            steps = [setting["every"] * (i + 1) for i in range(len(run["masked_lm_loss"]))]
            label = TITLES[run["placement"]] if run["seed"] == setting["seeds"][0] else None
            axes.plot(steps, run["masked_lm_loss"], color=COLOURS[run["placement"]], linewidth=1.2, label=label)
        axes.set_title(f"{panel['layers']} layers, peak learning rate {panel['learning_rate']:g}")
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("masked-LM training loss, nats")
    figure.axes[0].legend()
    figure.suptitle(f"BERT of hidden size {setting['hidden']}, a line for each of {len(setting['seeds'])} seeds")
    figure.savefig(file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and draw."""
    parser = make_parser(__doc__, "quick", "redraw")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trainings at a time, one thread each")
    given, file = parse(parser, arguments, "layernorm_placement")
    if not given.redraw:
        write(file, measure(QUICK if given.quick else Setting(), given.workers))
    draw(read(file), file.with_suffix(".png"))


if __name__ == "__main__":
    main()
