"""``hf-megatron quickstart``: text, tokenizer, training at TP=N, evaluation, conversion and check on one CPU, offline.

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
from pathlib import Path
from typing import Annotated, Any

import typer

import hf_megatron_conversion
from hf_megatron.commands.console import JsonOption, print_message, report
from hf_megatron.commands.torchrun import run_ranks
from hf_megatron.errors import DestinationError, HfMegatronError

_DEFAULT_STEPS = 160
_MAX_TP = 16  # the model has a few heads, and every rank is a process on this machine
# Both sides compute in float32 and in another order: differences are rounding, relative to logits of about 10.
_MAX_RELATIVE_LOGIT_DIFF = 1e-5
_OUTPUT, _REPORT = Path("hf-megatron-quickstart"), "quickstart.json"
_TRAINING = "hf_megatron.commands.quickstart.train"
# On an AMD EPYC: starting five processes, one after another, and what one rank takes to train and to evaluate.
_SECONDS_TO_START = 25
_SECONDS_PER_RANK = 25


def command(
    tp: Annotated[int, typer.Option(min=1, max=_MAX_TP, help="Tensor-parallel degree.")] = 2,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to leave the model.")] = _OUTPUT,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = _DEFAULT_STEPS,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the directory of an earlier quickstart.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Train a small GPT-2 at TP=N on the CPU, convert it, and check that stock transformers writes the same."""
    from hf_megatron.checkpoint import AtomicDirectory

    started = time.monotonic()
    destination = output.resolve()
    directory = AtomicDirectory(destination, replace=overwrite)
    if destination.exists() and not (destination / _REPORT).is_file():
        raise DestinationError(f"{destination} was not written by a quickstart, and will not be replaced.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    expected = _SECONDS_TO_START + _SECONDS_PER_RANK * steps / _DEFAULT_STEPS * tp / min(tp, cores)
    print_message(f"This takes about {expected:.0f} seconds, if {cores} cores are idle.")
    with directory:
        result = _run_stages(directory.path, tp, steps)
        result |= {"tp_dir": str(destination / "tp"), "hub_dir": str(destination / "hub")}
        result["seconds"] = round(time.monotonic() - started, 1)
        (directory.path / _REPORT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        directory.publish()
    return report("Quickstart", result, as_json, ok=not result["problems"])


def _run_stages(work: Path, tp_size: int, steps: int) -> dict[str, Any]:
    from hf_megatron.commands.quickstart.train import read_corpus, train_tokenizer

    train, held_out = read_corpus()
    num_characters = sum(map(len, train + held_out))
    print_message(f"1/5  Text: {num_characters:,} characters of Python's own help topics; training a tokenizer on it")
    tokenizer = train_tokenizer(train, work / "tokenizer")
    print_message(
        f"2/5  Training a small GPT-2 from scratch on {tp_size} ranks ({len(tokenizer):,} tokens in its vocabulary)"
    )
    _train(work, tp_size, steps)
    result: dict[str, Any] = json.loads((work / "result.json").read_text(encoding="utf-8"))
    print_message(
        f"3/5  Loss {result['loss_first']:.2f} -> {result['loss_last']:.2f}; "
        f"held-out perplexity {result['perplexity']:.1f}. Saved by the ranks; converting it to the Hub's format"
    )
    hf_megatron_conversion.convert(work / "tp", work / "hub", to="hub", verify=True)
    print_message("4/5  Loading it in another process, with stock transformers only")
    check = _check_in_stock(work)
    result |= {"max_logit_diff_stock": check["max_logit_diff"], "continuation": check["continuation"]}
    result["problems"] = _problems(result, check)
    print_message(f"5/5  {check['model_class']}: largest logit difference {check['max_logit_diff']:.1e}")
    if check["same_continuation"]:
        print_message(f"     {tp_size} ranks and stock transformers write the same: {check['continuation']!r}")
    for problem in result["problems"]:
        print_message(f"     This should not be: {problem}")
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
    if check["max_logit_diff"] > _MAX_RELATIVE_LOGIT_DIFF * check["largest_logit"]:
        problems.append(f"the logits of stock transformers differ by up to {check['max_logit_diff']:.1e}.")
    if not check["same_continuation"]:
        problems.append(
            f"the ranks write {check['continuation']!r}, stock transformers {check['stock_continuation']!r}."
        )
    return problems


def _train(work: Path, tp_size: int, steps: int) -> None:
    # One thread per rank, which is what torchrun sets as well, after a warning.
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    status = run_ranks(_TRAINING, [str(work), str(steps)], tp_size, **environment)
    if status:
        raise HfMegatronError(f"training failed with exit code {status}; what the ranks printed stands above.")


def _check_in_stock(work: Path) -> dict[str, Any]:
    # -I: neither the current directory nor PYTHONPATH can bring this package in.
    script = Path(__file__).with_name("stock_check.py")
    command = [sys.executable, "-I", *map(str, (script, work / "hub", work / "expected.pt"))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise HfMegatronError(
            f"stock transformers did not load {work / 'hub'} (exit code {done.returncode}); its error stands above."
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
