"""``hf-megatron tokenize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_megatron.commands.console import JsonOption, human_bytes, report, token_progress


def command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="Files: .txt, each a document, or .jsonl, each line one. Or one data set: a directory, or on the Hub.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write.")],
    tokenizer: Annotated[str, typer.Option(metavar="DIR", help="Directory or repository of the tokenizer.")],
    column: Annotated[str, typer.Option(help="Where the text is in a line or row.")] = "text",
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    config: Annotated[str | None, typer.Option(help="Of a data set, if it has several.")] = None,
    end_of_document: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="After each document; the tokenizer's eos token by default.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="How many tokenize; all cores if worth it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same work was interrupted, or let another go on.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be written, by the first texts.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Make token files for training, in Megatron-LM's format: tokens.bin, tokens.idx and the tokenizer.

    The destination appears complete or not at all.
    """
    from hf_megatron.paper.data.text_sources import open_sources
    from hf_megatron.paper.data.tokenizing import tokenize_to

    opened = open_sources(sources, column=column, split=split, configuration=config)
    with token_progress() as progress:
        done = tokenize_to(
            destination,
            opened,
            tokenizer,
            end_of_document=end_of_document,
            processes=processes,
            overwrite=overwrite,
            resume=resume,
            dry_run=dry_run,
            progress=progress,
        )
    shown = {
        **vars(done),
        "bytes_written": human_bytes(done.bytes_written),
        "tokens_per_second": f"{done.tokens_per_second:,.0f}",
    }
    title = "Would be tokenized, about (dry run)" if dry_run else "Tokenized"
    return report(title, vars(done), as_json, shown=shown)
