"""The paper's figure 6 in miniature: GPT-2 of three sizes on the same tokens, and how fast their perplexity falls.

    python -m benchmarks.bench_model_sizes wikitext-2/*.txt   # writes results/model_sizes.{json,png}
    python -m benchmarks.bench_model_sizes --redraw           # draws the data that is there

The files are WikiText's, or any text: where a line begins an article (" = Title = ") a document begins. What is
measured, and what it does not show, is told in README.md beside this file.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from transformers import GPT2TokenizerFast, PrinterCallback, default_data_collator

from benchmarks.articles import hold_out, read_articles
from benchmarks.command_line import make_parser, parse
from benchmarks.records import environment, read, write
from benchmarks.runs import run_all
from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel, MegatronTrainer
from hf_megatron.paper.data import PackedDocuments
from hf_megatron.paper.recipe import GPT2_PRETRAINING

HEAD_SIZE = 32
COLOURS = ("tab:green", "tab:orange", "tab:blue", "tab:red")


@dataclass(frozen=True)
class Size:
    """A model; its heads are all equally wide."""

    layers: int
    hidden: int


@dataclass(frozen=True)
class Setting:
    """What all trainings share; each sees every sequence at most once, and is tested ``points`` times."""

    sizes: tuple[Size, ...] = (Size(2, 64), Size(4, 128), Size(6, 256))
    seeds: tuple[int, ...] = (1, 2)
    vocab: int = 4096
    length: int = 128
    batch: int = 4
    learning_rate: float = 1e-3
    warm_up: float = 0.05  # of the steps; the paper's 1% would be twelve of them here
    points: int = 15
    held_out: float = 0.05


@dataclass(frozen=True)
class Run:
    """One training."""

    size: Size
    seed: int


@dataclass(frozen=True)
class Tokens:
    """The token ids of each article to learn from and to be tested on."""

    train: list[list[int]]
    test: list[list[int]]
    vocab: int
    end_of_document: int


QUICK = Setting(sizes=(Size(1, 32), Size(2, 32)), seeds=(1,), vocab=300, length=16, batch=8, points=3, held_out=0.2)


class Collator:
    """Makes batches, and a digest of all that it has made."""

    def __init__(self) -> None:
        self.digest = sha256()

    def __call__(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        """Stack examples; there is nothing to pad."""
        batch: dict[str, torch.Tensor] = default_data_collator(examples)
        self.digest.update(batch["input_ids"].numpy().tobytes())
        return batch


def tokenize(articles: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The ids of each; an article may be longer than a sequence."""
    return [tokenizer(article, verbose=False)["input_ids"] for article in articles]


def make_tokens(files: Sequence[Path], tokenizer_name: str | None, setting: Setting) -> Tokens:
    """Split the articles, and train a tokenizer on those to learn from unless there is one."""
    train, test = hold_out(read_articles(files), setting.held_out)
    if tokenizer_name is None:
        tokenizer = GPT2TokenizerFast().train_new_from_iterator(train, setting.vocab, show_progress=False)
    else:
        tokenizer = GPT2TokenizerFast.from_pretrained(tokenizer_name)
    return Tokens(tokenize(train, tokenizer), tokenize(test, tokenizer), len(tokenizer), tokenizer.eos_token_id)


def train(run: Run, setting: Setting, tokens: Tokens) -> dict[str, Any]:
    """Train one model by the paper's recipe; returns the perplexities of the held-out articles, and what it took."""
    torch.set_num_threads(1)
    started = time.process_time()
    config = MegatronGPT2Config(
        vocab_size=tokens.vocab,
        n_positions=setting.length,
        n_embd=run.size.hidden,
        n_layer=run.size.layers,
        n_head=run.size.hidden // HEAD_SIZE,
        bos_token_id=tokens.end_of_document,
        eos_token_id=tokens.end_of_document,
        embd_pdrop=0.0,  # no token is seen twice
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = MegatronGPT2LMHeadModel.from_config(config, seed=run.seed)
    packing: dict[str, Any] = {"length": setting.length, "end_of_document": tokens.end_of_document}
    sequences = PackedDocuments(tokens.train, **packing)
    every = len(sequences) // setting.batch // setting.points
    collator = Collator()
    with tempfile.TemporaryDirectory() as output:
        arguments = GPT2_PRETRAINING.arguments(
            output,
            batch=setting.batch,
            max_steps=every * setting.points,
            learning_rate=setting.learning_rate,
            warmup_steps=setting.warm_up,
            lr_scheduler_kwargs={"min_lr": setting.learning_rate / 15},  # the paper's share of the peak
            activation_checkpointing=False,
            seed=run.seed,
            data_seed=run.seed,
            use_cpu=True,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
        )
        trainer = MegatronTrainer(
            model,
            arguments,
            train_dataset=sequences,
            eval_dataset=PackedDocuments(tokens.test, **packing),
            data_collator=collator,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    tests = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        **dataclasses.asdict(run),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batches": collator.digest.hexdigest()[:16],
        "steps": [entry["step"] for entry in tests],
        "perplexity": [exp(entry["eval_loss"]) for entry in tests],
        "cpu_seconds": time.process_time() - started,
    }


def measure(files: Sequence[Path], tokenizer_name: str | None, setting: Setting, workers: int) -> dict[str, Any]:
    """All trainings, ``workers`` at a time."""
    tokens = make_tokens(files, tokenizer_name, setting)
    wanted = [Run(size, seed) for size in reversed(setting.sizes) for seed in setting.seeds]
    return {
        "setting": dataclasses.asdict(setting),
        "files": [file.name for file in files],
        "train_articles": len(tokens.train),
        "train_tokens": sum(map(len, tokens.train)),
        "test_articles": len(tokens.test),
        "test_tokens": sum(map(len, tokens.test)),
        "environment": {**environment("torch", "transformers", "tokenizers"), "processes": workers},
        "runs": run_all(train, wanted, setting, tokens, workers=workers),
    }


def overtaken(runs: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any], int | None]]:
    """Each training and that of the next smaller size with the same seed, and when the first is where the other ends.

    Yields:
        The larger, the smaller, and the first step at which the larger's perplexity is at most the smaller's last one.
    """
    by_size = sorted(runs, key=lambda run: (run["seed"], run["parameters"]))
    for smaller, larger in pairwise(by_size):
        if larger["seed"] == smaller["seed"]:
            curve = zip(larger["steps"], larger["perplexity"], strict=True)
            yield larger, smaller, next((step for step, value in curve if value <= smaller["perplexity"][-1]), None)


def draw(results: dict[str, Any], file: Path) -> None:
    """A line for each training, a colour for each size."""
    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for size, colour in zip(results["setting"]["sizes"], COLOURS, strict=False):
        for run in (run for run in results["runs"] if run["size"] == size):
            label = f"{run['parameters'] / 1e6:.1f} million: {size['layers']} layers, hidden size {size['hidden']}"
            is_first = run["seed"] == results["setting"]["seeds"][0]
            axes.plot(run["steps"], run["perplexity"], color=colour, linewidth=1.2, label=label if is_first else None)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel(f"iterations of {results['setting']['batch']} x {results['setting']['length']} tokens")
    axes.set_ylabel("perplexity of a token of held-out articles")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="parameters")
    figure.suptitle(f"GPT-2 of three sizes, a line for each of {len(results['setting']['seeds'])} seeds")
    figure.savefig(file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, draw, and print the table that README.md has."""
    parser = make_parser(__doc__, "quick", "redraw")
    parser.add_argument("files", type=Path, nargs="*", help="text files")
    parser.add_argument("--tokenizer", help="directory or repository of a tokenizer, instead of training one")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trainings at a time, one thread each")
    given, file = parse(parser, arguments, "model_sizes")
    if not given.redraw:
        if not given.files:
            print("No data was given, so nothing is measured; name text files.")
            return
        write(file, measure(given.files, given.tokenizer, QUICK if given.quick else Setting(), given.workers))
    results = read(file)
    draw(results, file.with_suffix(".png"))
    for larger, smaller, step in overtaken(results["runs"]):
        print(
            f"seed {larger['seed']}: {larger['parameters']} parameters end at {larger['perplexity'][-1]:.1f} and reach "
            f"the {smaller['perplexity'][-1]:.1f} of {smaller['parameters']} at step {step} of {larger['steps'][-1]}"
        )


if __name__ == "__main__":
    main()
