"""``hf-megatron evaluate``: load a model on one rank or several, and run one of the paper's evaluations.

For several ranks it starts this module under torchrun, or is itself started so, on several nodes say:

    torchrun --nproc-per-node 8 -m hf_megatron evaluate wikitext103 MODEL --data FILE
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_megatron.architectures import TABLES, Architecture
from hf_megatron.checkpoint import read_json
from hf_megatron.commands.console import JsonOption, messages_to_stderr, report
from hf_megatron.commands.torchrun import run_ranks
from hf_megatron.errors import DataError, HfMegatronError, UnsupportedError
from hf_megatron_conversion.formats import format_of
from hf_megatron_conversion.source import source_directory
from hf_megatron_conversion.tokenizer_files import has_tokenizer

# What each number is of, or per what.
_UNITS: Mapping[str, Mapping[str, str]] = {
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


def command(
    task: Annotated[Literal["wikitext103", "lambada"], typer.Argument(metavar="TASK", help="wikitext103 or lambada.")],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub or tp directory, or a repository, of a causal language model.")
    ],
    data: Annotated[Path, typer.Option(metavar="FILE", help="wiki.test.tokens, or lambada_test.jsonl.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree.")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="The tokenizer, if MODEL has none.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="How far windows advance: 32; more is quicker.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences at a time.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None,
        typer.Option(help="What to compute in; the checkpoint's by default."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Measure WikiText-103 perplexity or LAMBADA accuracy by the protocol of Megatron-LM's paper."""
    if task == "lambada" and stride is not None:
        raise UnsupportedError("stride is for wikitext103; LAMBADA has no windows.")
    if not data.is_file():
        raise DataError(f"{data} is no file; --data names the file to evaluate on.")
    directory = source_directory(model)
    _check_model(directory, tp)
    tokenizer = tokenizer or directory
    if not has_tokenizer(tokenizer):
        raise DataError(f"{tokenizer} has no tokenizer; name the directory of one with --tokenizer.")
    options = {name: value for name, value in (("batch_size", batch_size), ("stride", stride)) if value is not None}
    paths = {"directory": directory, "data": data, "tokenizer": tokenizer}
    job: dict[str, Any] = {name: str(path.resolve()) for name, path in paths.items()}
    job |= {"task": task, "dtype": dtype, "options": options}
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    found = _start_ranks(job, tp) if tp > 1 and world_size == 1 else _run(job, world_size)
    if int(os.environ.get("RANK", "0")):
        return 0  # the first rank prints
    units = _UNITS[task]
    numbers = {"task": task, "model": model, "tp_size": max(tp, world_size), **_EMPTY, **found}
    shown = {name: f"{value} {units.get(name, '')}".rstrip() for name, value in numbers.items() if value is not None}
    return report(f"{task} of {model}", {**numbers, "units": dict(units)}, as_json, shown=shown)


def _check_model(directory: Path, tp_size: int) -> None:
    """Refuse what can be refused without weights."""
    found = format_of(directory)
    if not found.has_config:
        raise UnsupportedError(
            f"{directory} is in format {found.name}, which cannot be run as it is; convert it first: "
            "hf-megatron convert SRC DST --to hub."
        )
    table, config = _table_of(directory)
    if table is None:
        return
    if not table.is_causal:
        name = table.name.upper()
        raise UnsupportedError(f"{directory} is a {name}, which sees the words that it would have to predict.")
    table.check_degree(config, tp_size)


def _table_of(directory: Path) -> tuple[Architecture | None, Mapping[str, Any]]:
    """The table of a model, or None if it is of another architecture, and its config.json."""
    config = read_json(directory / "config.json")
    return next((table for table in TABLES if table.is_for(config)), None), config


def _start_ranks(job: Mapping[str, Any], tp_size: int) -> dict[str, Any]:
    """Run the job under torchrun, on ranks of this machine."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        arguments = [json.dumps(job), str(result)]
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // tp_size))
        status = run_ranks("hf_megatron.commands.evaluate", arguments, tp_size, OMP_NUM_THREADS=threads)
        if not result.is_file():
            raise HfMegatronError(f"the ranks ended with exit code {status}; what they printed stands above.")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        raise DataError(found["error"])
    return found


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


def _run(job: Mapping[str, Any], tp_size: int) -> dict[str, Any]:
    """Run the job on this rank; with several ranks, loading the model joins them, and this leaves them again."""
    import torch.distributed as dist

    from hf_megatron.paper.evaluation import evaluate_lambada, evaluate_wikitext103, read_passages

    try:
        model, tokenizer = _load(Path(job["directory"]), Path(job["tokenizer"]), job["dtype"], tp_size)
        data, options = Path(job["data"]), {"show_progress": True, **job["options"]}
        if job["task"] == "lambada":
            return vars(evaluate_lambada(model, tokenizer, read_passages(data), **options))
        try:
            text = data.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{data} is not UTF-8 text: {error}.") from error
        return vars(evaluate_wikitext103(model, tokenizer, text, **options))
    finally:
        if tp_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


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
    table = _table_of(directory)[0] if is_cut else None
    model_class: Any = AutoModelForCausalLM if table is None else getattr(hf_megatron, table.classes[0].ours)
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


if __name__ == "__main__":
    _rank_main(*sys.argv[1:])
