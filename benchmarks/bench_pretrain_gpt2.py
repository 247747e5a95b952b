"""A small GPT-2 with the whole vocabulary learns real text: examples/pretrain_gpt2.py at TP=1 and TP=2.

    python -m benchmarks.bench_pretrain_gpt2 wikitext-2/*.txt   # writes results/pretrain_gpt2.{json,png}
    python -m benchmarks.bench_pretrain_gpt2 --redraw           # draws the data that is there

The files are WikiText's, or any text: where a line begins an article (" = Title = ") a document begins. What is
measured, and what it does not show, is told in README.md beside this file.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.articles import hold_out, read_articles
from benchmarks.command_line import add_fields, fields_of, make_parser, parse
from benchmarks.records import environment, read, write
from benchmarks.runs import flags, ranks, run_example

DEGREES = (1, 2)


@dataclass(frozen=True)
class Setting:
    """What all runs share; ``held_out`` is the share of the documents that is not trained on."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    length: int = 128
    batch: int = 8
    steps: int = 200
    learning_rate: float = 2e-3
    held_out: float = 0.015
    seed: int = 1


def save(texts: list[str], directory: Path) -> list[Path]:
    """Write each article to a file of its own, as the example takes them."""
    directory.mkdir()
    files = [directory / f"{i}.txt" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def run(tp_size: int, train: list[Path], test: list[Path], tokenizer: str, setting: Setting) -> dict[str, Any]:
    """Run the example; returns its losses and perplexities."""
    options = {name: value for name, value in dataclasses.asdict(setting).items() if name != "held_out"}
    arguments = flags({**options, "tokenizer": tokenizer})
    arguments += ["--text", *map(str, train), "--validation", *map(str, test)]
    history = run_example("pretrain_gpt2", tp_size, train[0].parent.parent / f"tp{tp_size}", arguments)
    trained = [entry for entry in history if "loss" in entry]
    tested = [entry for entry in history if "eval_loss" in entry]
    return {
        "tp_size": tp_size,
        "steps": [entry["step"] for entry in trained],
        "loss": [round(float(entry["loss"]), 4) for entry in trained],
        "tested_steps": [entry["step"] for entry in tested],
        "perplexity": [round(exp(entry["eval_loss"]), 2) for entry in tested],
    }


def measure(files: list[Path], tokenizer: str, setting: Setting) -> dict[str, Any]:
    """Split the articles and run every degree on them."""
    learnt, held_out = hold_out(read_articles(files), setting.held_out)
    with tempfile.TemporaryDirectory() as name:
        train, test = save(learnt, Path(name) / "train"), save(held_out, Path(name) / "test")
        runs = [run(tp_size, train, test, tokenizer, setting) for tp_size in DEGREES]
    return {
        "setting": dataclasses.asdict(setting),
        "files": [file.name for file in files],
        "train_documents": len(train),
        "test_documents": len(test),
        "runs": runs,
        "environment": environment("torch", "transformers"),
    }


def draw(results: dict[str, Any], file: Path) -> None:
    """Loss on the text that is learnt, and perplexity of the text that is held out."""
    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, style in zip(results["runs"], ("-", "--"), strict=True):
        left.plot(run["steps"], run["loss"], style, label=ranks(run["tp_size"]))
        right.plot(run["tested_steps"], run["perplexity"], style, label=ranks(run["tp_size"]))
    left.set_ylabel("training loss, nats")
    right.set_ylabel("perplexity of a token of held-out text")
    right.set_yscale("log")
    right.yaxis.set_major_formatter(ScalarFormatter())
    right.yaxis.set_minor_formatter(ScalarFormatter())
    for axes in (left, right):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    setting = results["setting"]
    figure.suptitle(
        f"GPT-2 of {setting['layers']} layers, hidden size {setting['hidden']}, {', '.join(results['files'])}"
    )
    figure.savefig(file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, draw, and tell how far the two degrees are apart."""
    parser = make_parser(__doc__, "redraw")
    parser.add_argument("files", type=Path, nargs="*", help="text files")
    parser.add_argument("--tokenizer", default="openai-community/gpt2", help="directory or repository of a tokenizer")
    add_fields(parser, Setting)
    given, file = parse(parser, arguments, "pretrain_gpt2")
    if not given.redraw:
        if not given.files:
            print("No data was given, so nothing is measured; name text files.")
            return
        write(file, measure(given.files, given.tokenizer, fields_of(given, Setting)))
    results = read(file)
    draw(results, file.with_suffix(".png"))
    one, two = (run["loss"] for run in results["runs"])
    apart = max(abs(b / a - 1) for a, b in zip(one, two, strict=True))
    print(f"a loss at TP=2 differs from that at TP=1 by at most {apart:.1e} of it")


if __name__ == "__main__":
    main()
