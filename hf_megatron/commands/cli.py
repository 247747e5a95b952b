"""The command ``hf-megatron``.

Nothing heavy is imported before the subcommand is known: ``--help`` and shell completion need neither torch nor
transformers, and ``inspect`` needs neither either.

Exit codes: 0 done; 1 a check did not hold; 2 usage error, or input refused.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import hf_megatron
import hf_megatron_conversion
from hf_megatron.commands.console import (
    human_bytes,
    messages_to_stderr,
    print_error,
    print_json,
    print_message,
    print_table,
    progress_bar,
)
from hf_megatron.errors import HfMegatronError
from hf_megatron_conversion.formats import FormatName

app = typer.Typer(
    name="hf-megatron",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_DONE, _CHECK_FAILED, _REFUSED = 0, 1, 2
_INTERRUPTED = 130  # as a shell reports it

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object to stdout.")]


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"hf-megatron {hf_megatron.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """GPT-2 and BERT the Megatron way: convert checkpoints, look into them, plan and evaluate."""


@app.command()
def quickstart(
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel degree.")] = 2,
    output: Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Where to leave the model.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps.")] = 160,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the directory of an earlier quickstart.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Train a small GPT-2 at TP=N on the CPU, convert it, and check that stock transformers writes the same."""
    from hf_megatron.commands.quickstart import quickstart as run_quickstart

    result = run_quickstart(tp_size=tp, output=output, steps=steps, overwrite=overwrite, say=print_message)
    return _finish("Quickstart", result, as_json, code=_CHECK_FAILED if result["problems"] else _DONE)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A directory, or a repository on the Hub.")],
    as_json: JsonOption = False,
) -> int:
    """Say what a checkpoint is, and check that it is complete. Reads no weights."""
    result = vars(hf_megatron_conversion.inspect(path))
    shown = {**result, "bytes": human_bytes(result["bytes"])}
    return _finish(path, result, as_json, shown=shown)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A directory, or a repository on the Hub.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write.")],
    to: Annotated[FormatName, typer.Option("--to", help="Format to write.")],
    tp: Annotated[int | None, typer.Option("--tp", help="Tensor-parallel degree to write.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Cast to float32, bfloat16, float16 or float64; kept by default.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", help="Largest weight file of a hub directory, such as 5GB.")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", min=1, help="Vocabulary without the padding that Megatron-LM adds."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A config.json that takes the place of the source's.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Directory of a tokenizer that takes the place of the source's.")
    ] = None,
    model_type: Annotated[
        Literal["stock", "megatron"] | None,
        typer.Option("--model-type", help="Whose classes AutoModel gives: stock (default for hub) or megatron."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read the result back, compare every tensor, and run both models on the CPU."),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Change the format or the tensor-parallel degree of a checkpoint, bit for bit.

    The destination appears complete or not at all.
    """
    with progress_bar() as progress:
        conversion = hf_megatron_conversion.convert(
            source,
            destination,
            to=to,
            tp_size=tp,
            dtype=dtype,
            max_shard_size=max_shard_size,
            vocab_size=vocab_size,
            config=config,
            tokenizer=tokenizer,
            model_type=model_type,
            overwrite=overwrite,
            dry_run=dry_run,
            verify=verify,
            progress=progress,
        )
    return _finish_conversion(conversion, as_json)


@app.command()
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="A directory, or a repository on the Hub.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    logits: Annotated[bool, typer.Option("--logits", help="Also run both models on the CPU.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Compare two checkpoints tensor by tensor, across formats and degrees. Exit code 1 if they differ."""
    with progress_bar() as progress:
        verification = hf_megatron_conversion.verify(a, b, logits=logits, progress=progress)
    result = {**vars(verification), "mismatched": verification.mismatched}
    shown = {**result, "differences": [f"{name}: {reason}" for name, reason in verification.differences.items()]}
    del shown["mismatched"]
    title = "The same model" if verification.equal else "Not the same model"
    return _finish(title, result, as_json, shown=shown, code=_DONE if verification.equal else _CHECK_FAILED)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A size of the paper such as gpt2-8.3b, a config.json, a directory, or a repository."
        ),
    ],
    tp: Annotated[int | None, typer.Option("--tp", help="Tensor-parallel degree: 1; with --gpus any.")] = None,
    dp: Annotated[int | None, typer.Option("--dp", help="Data-parallel degree: 1.")] = None,
    pp: Annotated[int, typer.Option("--pp", help="Pipeline stages: 1, as these models have none.")] = 1,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="Find the best way to use so many.")] = None,
    global_batch: Annotated[int | None, typer.Option(min=1, help="Sequences of a step, with --gpus.")] = None,
    tokens: Annotated[float | None, typer.Option("--tokens", min=1, help="Tell the hours for so many tokens.")] = None,
    micro_batch: Annotated[int, typer.Option("--micro-batch", help="Sequences a rank computes at a time.")] = 1,
    seq: Annotated[int | None, typer.Option(help="Tokens per sequence; the model's longest by default.")] = None,
    accumulation: Annotated[int, typer.Option("--accumulation", help="Micro-batches per optimizer step.")] = 1,
    device: Annotated[
        str, typer.Option("--device", help="v100-32gb, a100-80gb, h100, h200, or a JSON file that describes one.")
    ] = "a100-80gb",
    precision: Annotated[
        Literal["fp32", "amp", "bf16", "master"],
        typer.Option("--precision", help="amp: float32 weights, 16-bit autocast; master: 16-bit, float32 copies."),
    ] = "amp",
    recompute: Annotated[
        Literal["none", "selective", "full"] | None,
        typer.Option("--recompute", help="What the backward pass computes again: none; with --gpus any."),
    ] = None,
    attention: Annotated[Literal["sdpa", "eager"], typer.Option("--attention", help="Fused, or written out.")] = "sdpa",
    sequence_parallel: Annotated[bool | None, typer.Option(help="Split along the sequence what TP replicates.")] = None,
    fsdp: Annotated[bool | None, typer.Option(help="Data-parallel ranks share weights and optimizer.")] = None,
    dropout: Annotated[bool, typer.Option("--dropout/--no-dropout", help="The configuration's dropout.")] = True,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw memory by kind over TP degrees.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Say what training needs per rank, whether it fits, and how long a step takes, before anything is rented.

    Exits with 1 if it does not fit.
    """
    from hf_megatron.commands.plan import plan_run

    result, shown = plan_run(
        model,
        device=device,
        precision=precision,
        sequence_length=seq,
        pp_size=pp,
        num_gpus=gpus,
        global_batch=global_batch,
        num_tokens=tokens,
        plot=plot,
        tp_size=tp,
        dp_size=dp,
        micro_batch=micro_batch,
        accumulation=accumulation,
        recompute=recompute,
        attention=attention,
        sequence_parallel=sequence_parallel,
        fsdp=fsdp,
        dropout=dropout,
    )
    return _finish(model, result, as_json, shown=shown, code=_DONE if result["fits"] else _CHECK_FAILED)


@app.command()
def evaluate(
    task: Annotated[Literal["wikitext103", "lambada"], typer.Argument(metavar="TASK", help="wikitext103 or lambada.")],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub or tp directory, or a repository, of a causal language model.")
    ],
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="wiki.test.tokens, or lambada_test.jsonl.")],
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel degree.")] = 1,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="The tokenizer, if MODEL has none.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="How far windows advance: 32; more is quicker.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Sequences at a time.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None,
        typer.Option("--dtype", help="What to compute in; the checkpoint's by default."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Measure WikiText-103 perplexity or LAMBADA accuracy by the protocol of Megatron-LM's paper."""
    from hf_megatron.commands.evaluate import evaluate as run_evaluation

    result = run_evaluation(
        task, model, data=data, tp_size=tp, tokenizer=tokenizer, dtype=dtype, batch_size=batch_size, stride=stride
    )
    if result is None:
        return _DONE
    shown = {name: value for name, value in result.items() if name != "units" and value is not None}
    for name, unit in result["units"].items():
        shown[name] = f"{shown[name]} {unit}"
    return _finish(f"{task} of {model}", result, as_json, shown=shown)


def main() -> None:
    """Run the command line of this process, and exit."""
    messages_to_stderr()
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    as_json = "--json" in arguments
    try:
        code = int(app(list(arguments), standalone_mode=False))
    except typer.Abort:
        code = _INTERRUPTED
    except Exception as error:
        if os.environ.get("HF_MEGATRON_DEBUG"):
            raise
        return _report(error, as_json)
    if code == _INTERRUPTED:
        print_error("Interrupted.", "KeyboardInterrupt", as_json=as_json)
    return code


def _report(error: Exception, as_json: bool) -> int:
    """Say what went wrong, in one message."""
    kind = type(error).__name__
    if hasattr(error, "format_message") and hasattr(error, "show"):
        # A usage error of typer's, which shows the usage line with its message.
        error.show()
        if as_json:
            print_json({"error": error.format_message(), "error_type": kind})
        return _REFUSED
    message = str(error)
    if not isinstance(error, (OSError, HfMegatronError)):
        message = f"{kind}: {error}\nThis is a defect of hf-megatron; HF_MEGATRON_DEBUG=1 shows where."
    print_error(message, kind, as_json=as_json)
    return _REFUSED


def _finish(
    title: str, result: dict[str, Any], as_json: bool, *, shown: dict[str, Any] | None = None, code: int = _DONE
) -> int:
    """Print a result, as JSON or for people, and return the exit code."""
    if as_json:
        print_json(result)
    else:
        print_table(title, result if shown is None else shown)
    return code


def _finish_conversion(conversion: Any, as_json: bool) -> int:
    """Print what a conversion did, and return the exit code."""
    result = vars(conversion)
    files = [f"{name}: {human_bytes(size)}" for name, size in conversion.files.items()]
    shown = {
        **result,
        "bytes_written": human_bytes(conversion.bytes_written),
        "peak_rss_bytes": human_bytes(conversion.peak_rss_bytes),
        "files": files,
    }
    title = "Would be converted (dry run)" if conversion.dry_run else "Converted"
    code = _DONE
    if conversion.verified is False:
        title, code = "The result differs from the source; nothing was left at the destination", _CHECK_FAILED
    return _finish(title, result, as_json, shown=shown, code=code)


def _terminate(signum: int, frame: object) -> None:
    # Lets a conversion clean up, which the default action does not.
    raise KeyboardInterrupt
