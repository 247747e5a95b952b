"""How fast the WikiText-103 evaluation is, next to a plain loop: one window at a time, the logits of all positions.

    python -m benchmarks.bench_wikitext103           # writes results/wikitext103.json
    python -m benchmarks.bench_wikitext103 --quick   # a tiny model and text, to see that it runs

The model is a GPT-2 with hidden size 256, 4 layers and GPT-2's vocabulary, the text 20,000 random tokens: time depends
on neither what the weights nor what the words are. The loop takes every n-th window of the text, between two runs of
the evaluation; per window its time is the same for all. That both compute the same losses is the tests' business.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.command_line import make_parser, parse
from benchmarks.records import environment, write
from hf_megatron.paper.evaluation import evaluate_wikitext103
from hf_megatron.paper.evaluation.wikitext103 import windows

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
        "environment": {**environment("torch", "transformers"), "threads": torch.get_num_threads()},
        "loop_windows": loop_windows,
        "seconds_per_window": {"evaluation": seconds, "loop": loop_seconds},
        "seconds_for_the_text": {
            "evaluation": runs[1].seconds,
            "loop_expected": loop_seconds * runs[1].examples,
        },
        "ratio": loop_seconds / seconds,
        "seconds_expected_for_the_test_set": seconds * num_windows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print what was written."""
    given, file = parse(make_parser(__doc__, "quick"), arguments, "wikitext103")
    write(file, measure(QUICK if given.quick else Setting()))
    print(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
