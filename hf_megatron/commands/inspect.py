"""``hf-megatron inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

import hf_megatron_conversion
from hf_megatron.commands.console import JsonOption, human_bytes, report


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A directory, or a repository on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of what is on the Hub.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Say what a checkpoint is, and check that it is complete. Reads no weights."""
    result = vars(hf_megatron_conversion.inspect(path, revision=revision))
    return report(path, result, as_json, shown={**result, "bytes": human_bytes(result["bytes"])})
