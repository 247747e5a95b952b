"""``hf-megatron convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import hf_megatron_conversion
from hf_megatron.commands.console import JsonOption, human_bytes, progress_bar, report
from hf_megatron_conversion.formats import Container, FormatName, TransformerImpl


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A directory, or a repository on the Hub.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write.")],
    to: Annotated[FormatName, typer.Option(help="Format to write.")],
    container: Annotated[
        Container | None,
        typer.Option(help="Of megatron-core: torch_dist (default), for any degree, or torch, one file per rank."),
    ] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel degree to write.")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages to write, in the container torch.")] = None,
    transformer_impl: Annotated[
        TransformerImpl | None,
        typer.Option(help="Whose names the container torch has: transformer_engine (default) or local."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Cast to float32, bfloat16, float16 or float64; kept by default.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest weight file of hub or torch_dist, such as 5GB.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Vocabulary without the padding that Megatron-LM adds.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json that takes the place of the source's.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of a tokenizer that takes the place of the source's.")
    ] = None,
    model_type: Annotated[
        Literal["stock", "megatron"] | None,
        typer.Option(help="Whose classes AutoModel gives: stock (default for hub) or megatron."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a source on the Hub.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="What the process may take, such as 500MB.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same conversion was interrupted, or let another go on.")
    ] = False,
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
    layout: dict[str, Any] = {"to": to, "container": container, "tp_size": tp, "pp_size": pp}
    layout |= {"transformer_impl": transformer_impl, "dtype": dtype, "max_shard_size": max_shard_size}
    given: dict[str, Any] = {"vocab_size": vocab_size, "config": config, "tokenizer": tokenizer}
    given |= {"model_type": model_type, "revision": revision}
    how: dict[str, Any] = {"max_memory": max_memory, "overwrite": overwrite, "resume": resume}
    how |= {"dry_run": dry_run, "verify": verify}
    with progress_bar() as progress:
        conversion = hf_megatron_conversion.convert(source, destination, **layout, **given, **how, progress=progress)
    return _report(conversion, as_json)


def _report(conversion: hf_megatron_conversion.Conversion, as_json: bool) -> int:
    result = vars(conversion)
    shown = {
        **{name: value for name, value in result.items() if name not in ("sha256", "source_sha256")},
        "bytes_written": human_bytes(conversion.bytes_written),
        "peak_rss_bytes": human_bytes(conversion.peak_rss_bytes),
        "files": [f"{name}: {human_bytes(size)}" for name, size in conversion.files.items()],
    }
    has_failed = conversion.verified is False
    title = "Would be converted (dry run)" if conversion.dry_run else "Converted"
    if has_failed:
        title = "The result differs from the source; nothing was left at the destination"
    return report(title, result, as_json, shown=shown, ok=not has_failed)
