"""``hf-megatron evaluate``: load a model on one rank or several, and run one of the paper's evaluations.

For several ranks it starts itself under torchrun, or is started so, on several nodes say:

    torchrun --nproc-per-node 8 -m hf_megatron evaluate wikitext103 MODEL --data FILE
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hf_megatron.architectures import TABLES
from hf_megatron.commands.console import messages_to_stderr
from hf_megatron.errors import DataError, HfMegatronError, UnsupportedError
from hf_megatron_conversion.formats import format_of
from hf_megatron_conversion.formats.base import load_config
from hf_megatron_conversion.source import source_directory
from hf_megatron_conversion.tokenizer_files import has_tokenizer

Task = Literal["wikitext103", "lambada"]

# Per what each number is, or of what.
UNITS: Mapping[str, Mapping[str, str]] = {
    "wikitext103": {
        "perplexity": "per word of the original text (original_tokens)",
        "loss": "nats per predicted token",
        "tokens": "predicted, of the model's vocabulary",
        "original_tokens": "words of the original text, end marks and punctuation included",
        "examples": "windows",
        "window": "tokens",
        "stride": "tokens",
    },
    "lambada": {
        "perplexity": "per last word, of one token or more",
        "accuracy": "share of passages, in [0, 1], whose last word is right in all its tokens",
        "tokens": "of all last words, of the model's vocabulary",
        "examples": "passages",
    },
}
# What every result has, whether it applies or not.
_EMPTY: Mapping[str, Any] = {"perplexity": None, "accuracy": None, "tokens": None, "original_tokens": None}


def evaluate(
    task: Task,
    model: str,
    *,
    data: Path,
    tp_size: int = 1,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    stride: int | None = None,
) -> dict[str, Any] | None:
    """Evaluate a checkpoint.

    Args:
        task: Which evaluation.
        model: A ``hub`` or ``tp`` directory, or a repository on the Hub, of a causal language model.
        data: The file to evaluate on.
        tp_size: Number of ranks to cut the model over; under torchrun it is cut over all there are.
        tokenizer: Directory of the tokenizer, if the model's has none.
        dtype: To compute in; the checkpoint's by default.
        batch_size: Sequences at a time.
        stride: How far the windows of ``wikitext103`` advance.

    Returns:
        ``task``, ``model``, ``tp_size``, ``perplexity``, ``accuracy``, ``tokens``, ``original_tokens``, ``examples``,
        ``seconds``, what else the evaluation has, and ``units``, which says per what each number is; None on all ranks
        but the first.

    Raises:
        UnsupportedError: A model that cannot be evaluated.
        DataError: No tokenizer, or a file that cannot be evaluated on.
        PartitionError: The model cannot be cut to this degree.
    """
    if task == "lambada" and stride is not None:
        raise UnsupportedError("stride is for wikitext103; LAMBADA has no windows.")
    if not data.is_file():
        raise DataError(f"{data} is no file; --data names the file to evaluate on.")
    directory = source_directory(model)
    _check_model(directory, tp_size)
    tokenizer = tokenizer or directory
    if not has_tokenizer(tokenizer):
        raise DataError(f"{tokenizer} has no tokenizer; name the directory of one with --tokenizer.")
    options = {name: value for name, value in (("batch_size", batch_size), ("stride", stride)) if value is not None}
    job = {
        "task": task,
        "directory": str(directory.resolve()),
        "data": str(data.resolve()),
        "tokenizer": str(tokenizer.resolve()),
        "dtype": dtype,
        "options": options,
    }
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    found = _on_ranks(job, tp_size) if tp_size > 1 and world_size == 1 else _run(job, world_size)
    if int(os.environ.get("RANK", "0")):
        return None
    head = {"task": task, "model": model, "tp_size": max(tp_size, world_size)}
    return {**head, **_EMPTY, **found, "units": dict(UNITS[task])}


def _check_model(directory: Path, tp_size: int) -> None:
    """Refuse what can be refused without weights."""
    found = format_of(directory)
    if not found.has_config:
        raise UnsupportedError(
            f"{directory} is in format {found.name}, which cannot be run as it is; convert it first: "
            "hf-megatron convert SRC DST --to hub."
        )
    config = load_config(directory / "config.json")
    table = next((table for table in TABLES if table.is_for(config)), None)
    if table is not None and not table.is_causal:
        name = table.name.upper()
        raise UnsupportedError(f"{directory} is a {name}, which sees the words that it would have to predict.")
    if table is not None:
        table.check_degree(config, tp_size)


def _on_ranks(job: Mapping[str, Any], tp_size: int) -> dict[str, Any]:
    """Run the job under torchrun, on ranks of this machine."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp_size}"]
        command += ["-m", "hf_megatron.commands.evaluate", json.dumps(job), str(result)]
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // tp_size))
        # stdout is kept for the result.
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        status = subprocess.run(command, env=environment, stdout=sys.stderr.fileno(), check=False).returncode
        if not result.is_file():
            raise HfMegatronError(f"the ranks ended with exit code {status}; what they printed stands above.")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        raise DataError(found["error"])
    return found


def _run(job: Mapping[str, Any], tp_size: int) -> dict[str, Any]:
    """Run the job on this rank; with several ranks, join them and leave them again."""
    import torch.distributed as dist

    try:
        return _evaluate(job, tp_size)
    finally:
        if tp_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _evaluate(job: Mapping[str, Any], tp_size: int) -> dict[str, Any]:
    from hf_megatron.paper.evaluation import evaluate_lambada, evaluate_wikitext103, read_passages

    model, tokenizer = _load(Path(job["directory"]), Path(job["tokenizer"]), job["dtype"], tp_size)
    data = Path(job["data"])
    if job["task"] == "lambada":
        passages = read_passages(data)
        return vars(evaluate_lambada(model, tokenizer, passages, show_progress=True, **job["options"]))
    try:
        text = data.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{data} is not UTF-8 text: {error}.") from error
    return vars(evaluate_wikitext103(model, tokenizer, text, show_progress=True, **job["options"]))


def _load(directory: Path, tokenizer_directory: Path, dtype: str | None, tp_size: int) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2TokenizerFast
    from transformers.distributed import DistributedConfig

    import hf_megatron

    arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if tp_size > 1:
        arguments["distributed_config"] = DistributedConfig(tp_size=tp_size)
    is_cut = tp_size > 1 or format_of(directory).name == "tp"
    config = load_config(directory / "config.json") if is_cut else {}
    ours = next((table.classes[0].ours for table in TABLES if table.is_for(config)), None)
    model_class: Any = AutoModelForCausalLM if ours is None else getattr(hf_megatron, ours)
    try:
        model = model_class.from_pretrained(directory, **arguments).eval()
        # A directory of nothing but GPT-2's two files does not say whose they are.
        says_what = [*tokenizer_directory.glob("*config.json"), *tokenizer_directory.glob("tokenizer.json")]
        tokenizer = (AutoTokenizer if says_what else GPT2TokenizerFast).from_pretrained(tokenizer_directory)
    except HfMegatronError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise UnsupportedError(f"{directory} is no causal language model that transformers loads: {error}") from error
    if tp_size == 1 and torch.cuda.is_available():
        model = model.to("cuda")
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; it is not this model's."
        )
    return model, tokenizer


def _rank_main(job: str, result: str) -> None:
    """What every rank runs; the first one writes the result."""
    is_first = os.environ["RANK"] == "0"
    if is_first:
        messages_to_stderr()
    try:
        found = _run(json.loads(job), int(os.environ["WORLD_SIZE"]))
    except HfMegatronError as error:
        found = {"error": str(error)}  # the same on every rank
    if is_first:
        Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _rank_main(*sys.argv[1:])
