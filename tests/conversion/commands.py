"""``hf-megatron``, run in this process, as a script meets it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_megatron.commands import cli


class Commands:
    """Runs command lines, of which ``capfd`` sees what they print."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def show(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        code = cli.run([str(argument) for argument in arguments])
        return code, *self._capfd.readouterr()

    def run(self, *arguments: object) -> tuple[int, dict[str, Any], str]:
        """With --json: exit code; the object, which must be all that stdout holds; stderr."""
        code, out, err = self.show(*arguments, "--json")
        assert out.count("\n") == 1
        return code, json.loads(out), err

    def refusal(self, *arguments: object) -> str:
        """What stderr says of a command line that must be refused, to people and to scripts alike."""
        code, result, err = self.run(*arguments)
        assert (code, set(result)) == (2, {"error", "error_type"})
        assert "Traceback" not in err
        return err
