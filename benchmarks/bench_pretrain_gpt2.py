"""A small GPT-2 with the whole vocabulary learns real text: examples/pretrain_gpt2.py at TP=1 and TP=2.

    python benchmarks/bench_pretrain_gpt2.py wikitext-2/*.txt   # writes results/pretrain_gpt2.{json,png}
    python benchmarks/bench_pretrain_gpt2.py --redraw           # draws the data that is there

The files are WikiText's, or any text: where a line begins an article (" = Title = ") a document begins. What is
measured, and what it does not show, is told in README.md beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure

NAME = "pretrain_gpt2"
HERE = Path(__file__).parent
RESULTS = HERE / "results"
EXAMPLE = HERE.parent / "examples" / "pretrain_gpt2.py"
DEGREES = (1, 2)
_ARTICLE = re.compile(r"^(?= = [^=\n]+ = $)", re.MULTILINE)


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


def documents(files: list[Path]) -> list[str]:
    """The articles of all files."""
    texts = (text for file in files for text in _ARTICLE.split(file.read_text(encoding="utf-8")))
    return [text for text in texts if text.strip()]


def save(texts: list[str], directory: Path) -> list[Path]:
    """Write each document to a file of its own, as the example takes them."""
    directory.mkdir()
    files = [directory / f"{i}.txt" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def run(tp_size: int, train: list[Path], test: list[Path], tokenizer: str, setting: Setting) -> dict[str, Any]:
    """Run the example, one thread a process; returns its losses and perplexities."""
    output = train[0].parent.parent / f"tp{tp_size}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp_size}"] if tp_size > 1 else []
    options = {name: value for name, value in dataclasses.asdict(setting).items() if name != "held_out"}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    arguments += [f"--output={output}", f"--tokenizer={tokenizer}", "--keep-activations"]
    arguments += ["--text", *map(str, train), "--validation", *map(str, test)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, *launcher, str(EXAMPLE), *arguments], env=environment, check=True)
    last = output / f"checkpoint-{setting.steps}" / "trainer_state.json"
    history = json.loads(last.read_text(encoding="utf-8"))["log_history"]
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
    """Split the documents and run every degree on them."""
    texts = documents(files)
    held_out = max(1, round(setting.held_out * len(texts)))
    with tempfile.TemporaryDirectory() as name:
        train = save(texts[held_out:], Path(name) / "train")
        test = save(texts[:held_out], Path(name) / "test")
        runs = [run(tp_size, train, test, tokenizer, setting) for tp_size in DEGREES]
    return {
        "setting": dataclasses.asdict(setting),
        "files": [file.name for file in files],
        "train_documents": len(train),
        "test_documents": len(test),
        "runs": runs,
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """What the numbers were measured with."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def draw(results: dict[str, Any], file: Path) -> None:
    """Loss on the text that is learnt, and perplexity of the text that is held out."""
    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, style in zip(results["runs"], ("-", "--"), strict=True):
        left.plot(run["steps"], run["loss"], style, label=f"TP={run['tp_size']}")
        right.plot(run["tested_steps"], run["perplexity"], style, label=f"TP={run['tp_size']}")
    left.set_ylabel("training loss, nats")
    right.set_ylabel("perplexity of a token of held-out text")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    setting = results["setting"]
    figure.suptitle(
        f"GPT-2 of {setting['layers']} layers, hidden size {setting['hidden']}, {', '.join(results['files'])}"
    )
    figure.savefig(file)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="*", help="text files")
    parser.add_argument("--tokenizer", default="openai-community/gpt2", help="directory or repository of a tokenizer")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory to write to")
    parser.add_argument("--redraw", action="store_true", help="draw the data of an earlier run")
    for field in dataclasses.fields(Setting):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)
    args = parser.parse_args()
    data = args.output / f"{NAME}.json"
    if args.files:
        setting = Setting(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Setting)})
        results = measure(args.files, args.tokenizer, setting)
        text = re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(results, indent=1))
        data.write_text(text + "\n", encoding="utf-8")  # each curve on one line
    elif not args.redraw:
        print("No data was given, so nothing is measured; name text files.")
        return
    draw(json.loads(data.read_text(encoding="utf-8")), data.with_suffix(".png"))


if __name__ == "__main__":
    main()
