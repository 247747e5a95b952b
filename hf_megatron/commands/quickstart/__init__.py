"""The whole journey on one CPU, without a download: text, tokenizer, training at TP=N, evaluation, conversion, check.

Each stage runs the way a user would run it: the ranks under torchrun, the conversion through the public function, and
the stock model in a process of its own that cannot import this package.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_megatron.checkpoint import AtomicDirectory
from hf_megatron.commands.quickstart.text import read_corpus, train_tokenizer
from hf_megatron.errors import DestinationError, HfMegatronError, PartitionError, UnsupportedError

__all__ = ["DEFAULT_OUTPUT", "DEFAULT_STEPS", "quickstart"]

DEFAULT_OUTPUT = Path("hf-megatron-quickstart")
DEFAULT_STEPS = 160
MAX_TP = 16  # the model has a few heads, and every rank is a process on this machine
# Both sides compute in float32 and in another order: differences are rounding, relative to logits of about 10.
MAX_RELATIVE_LOGIT_DIFF = 1e-5
_REPORT = "quickstart.json"
_TRAINING = "hf_megatron.commands.quickstart.train"
# On an AMD EPYC: starting five processes, one after another, and what one rank takes to train and to evaluate.
_SECONDS_TO_START = 25
_SECONDS_PER_RANK = 25


def quickstart(
    *,
    tp_size: int = 2,
    output: Path | None = None,
    steps: int = DEFAULT_STEPS,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train a small GPT-2 at TP=N, convert it to the Hub's format, and check it in stock transformers.

    Args:
        tp_size: Number of ranks, which run as processes on this machine.
        output: Directory to leave ``tp/``, ``hub/`` and ``quickstart.json`` in; ``DEFAULT_OUTPUT`` if None.
        steps: Training steps.
        overwrite: Replace the directory of an earlier quickstart.
        say: Receives a line per stage.

    Returns:
        ``tp_size``, ``steps``, ``loss_first`` and ``loss_last`` (mean of the last ten steps), ``perplexity`` of the
        held-out text, ``hub_dir``, ``tp_dir``, ``max_logit_diff_stock``, ``sample``, ``seconds``, and ``problems``:
        what does not hold of a loss that fell by a tenth, logits equal to those of stock transformers, and a greedy
        continuation that all ranks and stock transformers write alike.

    Raises:
        DestinationError: The output exists.
        HfMegatronError: A stage failed; what it printed stands above.
    """
    started = time.monotonic()
    destination = (output or DEFAULT_OUTPUT).resolve()
    if steps < 1:
        raise UnsupportedError(f"steps={steps}: train for at least one step.")
    if not 1 <= tp_size <= MAX_TP:
        raise PartitionError(f"tp_size={tp_size}: the quickstart runs 1 to {MAX_TP} ranks on this machine.")
    directory = AtomicDirectory(destination, replace=overwrite)
    if destination.exists() and not (destination / _REPORT).is_file():
        raise DestinationError(f"{destination} was not written by a quickstart, and will not be replaced.")
    say(f"This takes about {_expected_seconds(tp_size, steps):.0f} seconds, if {_cores()} cores are idle.")
    with directory:
        result = _run_stages(directory.path, tp_size, steps, say)
        result |= {"tp_dir": str(destination / "tp"), "hub_dir": str(destination / "hub")}
        result["seconds"] = round(time.monotonic() - started, 1)
        (directory.path / _REPORT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        directory.publish()
    return result


def _run_stages(work: Path, tp_size: int, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    corpus = read_corpus()
    say(f"1/5  Text: {corpus.num_characters:,} characters of Python's own help topics; training a tokenizer on it")
    tokenizer = train_tokenizer(corpus, work / "tokenizer")
    say(f"2/5  Training a small GPT-2 from scratch on {tp_size} ranks ({len(tokenizer):,} tokens in its vocabulary)")
    _train(work, tp_size, steps)
    result: dict[str, Any] = json.loads((work / "result.json").read_text(encoding="utf-8"))
    say(
        f"3/5  Loss {result['loss_first']:.2f} -> {result['loss_last']:.2f}; "
        f"held-out perplexity {result['perplexity']:.1f}. Saved by the ranks; converting it to the Hub's format"
    )
    _convert(work)
    say("4/5  Loading it in another process, with stock transformers only")
    check = _check_in_stock(work)
    result["max_logit_diff_stock"] = check["max_logit_diff"]
    result["continuation"] = check["continuation"]
    result["problems"] = _problems(result, check)
    say(f"5/5  {check['model_class']}: largest logit difference {check['max_logit_diff']:.1e}")
    if check["same_continuation"]:
        say(f"     {tp_size} ranks and stock transformers write the same: {check['continuation']!r}")
    for problem in result["problems"]:
        say(f"     This should not be: {problem}")
    for leftover in ("result.json", "expected.pt"):
        (work / leftover).unlink()
    shutil.rmtree(work / "tokenizer")
    return result


def _problems(result: dict[str, Any], check: dict[str, Any]) -> list[str]:
    """What should hold of a quickstart and does not."""
    problems = []
    if result["loss_last"] >= 0.9 * result["loss_first"]:
        problems.append(f"the loss fell from {result['loss_first']:.2f} to {result['loss_last']:.2f} only.")
    if check["missing_keys"] or check["unexpected_keys"]:
        problems.append(f"stock misses {check['missing_keys']} and does not know {check['unexpected_keys']}.")
    if check["max_logit_diff"] > MAX_RELATIVE_LOGIT_DIFF * check["largest_logit"]:
        problems.append(f"the logits of stock transformers differ by up to {check['max_logit_diff']:.1e}.")
    if not check["same_continuation"]:
        problems.append(
            f"the ranks write {check['continuation']!r}, stock transformers {check['stock_continuation']!r}."
        )
    return problems


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _expected_seconds(tp_size: int, steps: int) -> float:
    training = tp_size * _SECONDS_PER_RANK * steps / DEFAULT_STEPS
    return _SECONDS_TO_START + training / min(tp_size, _cores())


def _train(work: Path, tp_size: int, steps: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp_size}"]
    command += ["-m", _TRAINING, str(work), str(steps)]
    # One thread per rank, which is what torchrun sets as well, after a warning. stdout is kept for the result.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    status = subprocess.run(command, env=environment, stdout=sys.stderr.fileno(), check=False).returncode
    if status:
        raise HfMegatronError(f"training failed with exit code {status}; what the ranks printed stands above.")


def _convert(work: Path) -> None:
    from hf_megatron_conversion import convert

    convert(str(work / "tp"), work / "hub", to="hub", verify=True)


def _check_in_stock(work: Path) -> dict[str, Any]:
    # -I: neither the current directory nor PYTHONPATH can bring this package in.
    command = [sys.executable, "-I", str(Path(__file__).with_name("stock_check.py"))]
    command += [str(work / "hub"), str(work / "expected.pt")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise HfMegatronError(
            f"stock transformers did not load {work / 'hub'} (exit code {done.returncode}); its error stands above."
        )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report
