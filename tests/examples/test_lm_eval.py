"""lm-evaluation-harness on the model's classes, where it is installed: its scores are those of stock transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.repository import ROOT

_TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
metric_list: {metrics}
"""
_LAST_WORD = ("{{text.split(' ')[:-1]|join(' ')}}", "{{' '+text.split(' ')[-1]}}")


def _prepare(directory: Path) -> None:
    """A model that is not equally unsure of everything, byte by byte, and two tasks like LAMBADA and WikiText."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *sorted(alphabet)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, model_max_length=64)
    fast.save_pretrained(directory / "model")
    config = GPT2Config(vocab_size=257, n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(directory / "model")
    texts = [
        f"the sum of {n} and {n + 1} is {2 * n + 1} and that of the others is not known to rank {n % 3}"
        for n in range(12)
    ]
    data = directory / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    last = "[{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc, aggregation: mean}]"
    pages = "[{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]"
    (directory / "tasks").mkdir()
    for name, kind, (text, target), metrics in (
        ("last_word", "loglikelihood", _LAST_WORD, last),
        ("pages", "loglikelihood_rolling", ("", "{{text}}"), pages),
    ):
        task = _TASK.format(name=name, data=data, kind=kind, text=text, target=target, metrics=metrics)
        (directory / "tasks" / f"{name}.yaml").write_text(task)


def _evaluate(directory: Path, name: str, *launcher: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
    arguments = ["model", "--tasks", "last_word,pages", "--include-path", "tasks", "--dtype", "float64"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'conversion'}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = [
        str(ROOT / "examples" / "evaluate_lm_eval.py"),
        *arguments,
        "--bootstrap",
        "0",
        "--output",
        f"{name}.json",
    ]
    subprocess.run(
        [sys.executable, *launcher, *script, *options], cwd=directory, env=environment, check=True, timeout=500
    )
    found: dict[str, Any] = json.loads((directory / f"{name}.json").read_text())
    return found


def _digits(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """As the harness prints them."""
    return {
        task: {name: f"{value:.4f}" for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_scores_are_those_of_stock(tmp_path: Path) -> None:
    """Catches requests that only one rank sees, and log probabilities of another position or part of the words."""
    pytest.importorskip("lm_eval", reason="lm-eval is not among the dependencies: pip install lm-eval")
    _prepare(tmp_path)
    stock = _evaluate(tmp_path, "stock", options=("--stock",))
    one = _evaluate(tmp_path, "one")
    two = _evaluate(tmp_path, "two", "-m", "torch.distributed.run", "--nproc-per-node", "2")
    assert len(_digits(stock)["pages"]) == 3
    assert _digits(one) == _digits(stock)
    assert _digits(two) == _digits(stock)
