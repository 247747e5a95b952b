"""The subcommands of ``hf-megatron``, and the exit codes of their errors.

Exit codes: 0 done; 1 a check did not hold; 2 usage error, or input refused; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import hf_megatron
from hf_megatron.commands import convert, evaluate, inspect, plan, quickstart, tokenize, verify
from hf_megatron.commands.console import messages_to_stderr, print_error, print_json, printable
from hf_megatron.errors import HfMegatronError

_REFUSED, _INTERRUPTED = 2, 130

app = typer.Typer(name="hf-megatron", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
for _module in (quickstart, inspect, convert, verify, plan, tokenize, evaluate):
    app.command(_module.__name__.rpartition(".")[2])(_module.command)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"hf-megatron {hf_megatron.__version__}")
        raise typer.Exit


_VersionOption = typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")


@app.callback()
def _common(version: Annotated[bool, _VersionOption] = False) -> None:
    """GPT-2 and BERT the Megatron way: convert checkpoints, look into them, plan and evaluate."""


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
        return _refuse(error, as_json)
    if code == _INTERRUPTED:
        print_error("Interrupted.", "KeyboardInterrupt", as_json=as_json)
    return code


def _refuse(error: Exception, as_json: bool) -> int:
    """Say in one message what went wrong, and return the exit code."""
    kind = type(error).__name__
    if hasattr(error, "format_message") and hasattr(error, "show"):
        # A usage error of typer's, which shows the usage line with its message.
        error.message = printable(error.format_message())  # type: ignore[attr-defined]
        error.show()
        if as_json:
            print_json({"error": error.format_message(), "error_type": kind})
        return _REFUSED
    message = str(error)
    if not isinstance(error, (OSError, HfMegatronError)):
        message = f"{kind}: {error}\nThis is a defect of hf-megatron; HF_MEGATRON_DEBUG=1 shows where."
    print_error(message, kind, as_json=as_json)
    return _REFUSED


def _terminate(signum: int, frame: object) -> None:
    # Lets a conversion clean up, which the default action does not.
    raise KeyboardInterrupt
