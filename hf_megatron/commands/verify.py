"""``hf-megatron verify``."""

from __future__ import annotations

from typing import Annotated

import typer

import hf_megatron_conversion
from hf_megatron.commands.console import JsonOption, progress_bar, report


def command(
    a: Annotated[str, typer.Argument(metavar="A", help="A directory, or a repository on the Hub.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    logits: Annotated[bool, typer.Option("--logits", help="Also run both models on the CPU.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of what is on the Hub.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Compare two checkpoints tensor by tensor, across formats and degrees. Exit code 1 if they differ."""
    with progress_bar() as progress:
        verification = hf_megatron_conversion.verify(a, b, logits=logits, revision=revision, progress=progress)
    found = vars(verification)
    shown = {**found, "differences": [f"{name}: {reason}" for name, reason in verification.differences.items()]}
    title = "The same model" if verification.equal else "Not the same model"
    result = {**found, "mismatched": verification.mismatched}
    return report(title, result, as_json, shown=shown, ok=verification.equal and not verification.damaged)
