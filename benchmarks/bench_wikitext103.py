"""How fast the WikiText-103 evaluation is, next to a plain loop: one window at a time, the logits of all positions.

    python benchmarks/bench_wikitext103.py           # writes results/wikitext103.json
    python benchmarks/bench_wikitext103.py --quick   # a tiny model and text, to see that it runs

The model is a GPT-2 with hidden size 256, 4 layers and GPT-2's vocabulary, the text 20,000 random tokens: time depends
on neither what the weights nor what the words are. The loop takes every n-th window of the text, between two runs of
the evaluation; per window its time is the same for all. That both compute the same losses is the tests' business.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from hf_megatron.evaluation import evaluate_wikitext103
from hf_megatron.evaluation.perplexity import windows

RESULTS = Path(__file__).parent / "results" / "wikitext103.json"
TEST_SET_TOKENS = 270_330


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    vocabulary: int = 50257
    tokens: int = 20_000
    window: int = 1024
    stride: int = 32
    loop_windows: int = 24


QUICK = Setting(hidden=32, layers=1, heads=2, vocabulary=97, tokens=400, window=64, loop_windows=4)


class Words:
    """Stands in for a tokenizer: every word of the text is a token's id."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """The ids."""
        return {"input_ids": [int(word) for word in text.split(" ")]}


def make_model(setting: Setting) -> GPT2LMHeadModel:
    """A model with fresh weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=setting.vocabulary,
        n_positions=setting.window,
        n_embd=setting.hidden,
        n_layer=setting.layers,
        n_head=setting.heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@torch.inference_mode()
def loop(model: GPT2LMHeadModel, ids: list[int], setting: Setting) -> tuple[float, int]:
    """Seconds per window of every n-th window but the first, and how many these are."""
    found = list(windows(len(ids), setting.window, setting.stride))[1:-1]
    chosen = found[:: max(1, len(found) // setting.loop_windows)][: setting.loop_windows]
    started, total = time.perf_counter(), 0.0
    for window in chosen:
        tokens = torch.tensor(ids[window.start : window.start + window.length + 1])
        logits = model(tokens[None, :-1]).logits[0]
        total += float(F.cross_entropy(logits[-window.predictions :], tokens[-window.predictions :], reduction="sum"))
    return (time.perf_counter() - started) / len(chosen), len(chosen)


def measure(setting: Setting) -> dict[str, Any]:
    """Both on one model and text, in one run."""
    model = make_model(setting)
    ids = torch.randint(setting.vocabulary, (setting.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    text = " ".join(map(str, ids))
    options: dict[str, Any] = {"window": setting.window, "stride": setting.stride}
    half = len(ids) // 2
    evaluate_wikitext103(model, Words(), " ".join(map(str, ids[: 2 * setting.window])), **options)  # warms up
    runs = [evaluate_wikitext103(model, Words(), " ".join(map(str, ids[:half])), **options)]
    loop_seconds, loop_windows = loop(model, ids, setting)
    runs.append(evaluate_wikitext103(model, Words(), text, show_progress=True, **options))
    seconds = sum(run.seconds for run in runs) / sum(run.examples for run in runs)
    num_windows = len(list(windows(TEST_SET_TOKENS, setting.window, setting.stride)))
    return {
        "setting": asdict(setting),
        "environment": environment(),
        "loop_windows": loop_windows,
        "seconds_per_window": {"evaluation": seconds, "loop": loop_seconds},
        "seconds_for_the_text": {
            "evaluation": runs[1].seconds,
            "loop_expected": loop_seconds * runs[1].examples,
        },
        "ratio": loop_seconds / seconds,
        "seconds_expected_for_the_test_set": seconds * num_windows,
    }


def environment() -> dict[str, Any]:
    """Where this ran."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Measure, print, and write results/wikitext103.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and text, and nothing is written")
    arguments = parser.parse_args()
    report = measure(QUICK if arguments.quick else Setting())
    print(json.dumps(report, indent=2))
    if not arguments.quick:
        RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
