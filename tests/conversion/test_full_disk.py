"""A disk that is full and then is not: what ``--resume`` goes on from, and what is at the destination meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_megatron.checkpoint import AtomicDirectory
from hf_megatron.errors import DestinationError
from hf_megatron_conversion import convert, files
from tests.conversion.checkpoints import directory_bytes
from tests.repository import environment

# The command line, for which no file can grow any more once it has read and written so many bytes.
_FULL_AFTER = """
import os, resource, sys
from hf_megatron.commands import cli, console

limit = int(sys.argv.pop())
os.sched_getaffinity = lambda _: {0}  # one file after the other

class Filling:
    def __init__(self, bars): self.left = limit
    def begin(self, task, total_bytes): pass
    def advance(self, num_bytes):
        self.left -= num_bytes
        if self.left < 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

console.ProgressBar = Filling
cli.main()
"""


def _files_until_full(source: Path, destination: Path, num_bytes: int) -> list[str]:
    """Convert to tp 6 on a disk that becomes full: the files that the failed conversion has left complete."""
    command = ["convert", str(source), str(destination), "--to", "tp", "--tp=6", "--overwrite", "--resume"]
    done = subprocess.run(
        [sys.executable, "-c", _FULL_AFTER, *command, str(num_bytes)],
        env=environment(HF_MEGATRON_REGISTER="0"),
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "space" in done.stderr or "File too large" in done.stderr
    journal = destination.parent / f".{destination.name}.incomplete/journal"
    return [line.split()[1] for line in journal.read_text().splitlines()[1:]] if journal.exists() else []


@pytest.mark.parametrize("num_bytes", [0, 60_000, 150_000, 240_000])
def test_a_conversion_goes_on_when_there_is_space(
    num_bytes: int, tied: Path, untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches complete files that a second attempt deletes because there still is no space, or that are half written.

    The old destination has to stay until the new one is there.
    """
    destination = tmp_path / "tp"
    convert(untied, destination, to="tp", tp_size=2)
    before = directory_bytes(destination)
    complete = _files_until_full(tied, destination, num_bytes)
    assert bool(complete) == (num_bytes > 0)
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    with monkeypatch.context() as context:
        context.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DestinationError, match="0 bytes of free space"):
            convert(tied, destination, to="tp", tp_size=6, overwrite=True, resume=True)
    assert directory_bytes(destination) == before
    write, written = files._write, []

    def noting(file: Any, *arguments: Any) -> str:
        written.append(file.path)
        return write(file, *arguments)

    monkeypatch.setattr(files, "_write", noting)
    result = convert(tied, destination, to="tp", tp_size=6, overwrite=True, resume=True)
    assert set(written) == set(result.files) - set(complete) - {"SHA256SUMS"}
    convert(tied, tmp_path / "expected", to="tp", tp_size=6)
    assert directory_bytes(destination) == directory_bytes(tmp_path / "expected")
    assert {path.name for path in tmp_path.iterdir()} == {"tp", "expected"}


@pytest.mark.parametrize("call", ["open", "pwrite", "ftruncate"])
def test_a_directory_that_cannot_be_marked_is_not_left_behind(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an empty mark, and a lock on it, that make this process take itself for another that is writing."""
    original = getattr(os, call)

    def full(*arguments: Any) -> Any:
        if call == "open" and not arguments[1] & os.O_CREAT:
            return original(*arguments)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, call, full)
        with pytest.raises(DestinationError, match="cannot be written: No space"), AtomicDirectory(tmp_path / "new/x"):
            pass
    assert list(tmp_path.iterdir()) == []
    with AtomicDirectory(tmp_path / "new/x") as directory:
        directory.publish()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"]


def test_what_was_left_stays_marked_when_it_cannot_be_marked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a directory with complete files in it that the next --resume does not dare to touch."""
    directory = AtomicDirectory(tmp_path / "x", resume=True)
    with directory:
        (directory.path / "complete").write_text("")
        directory.is_to_remove = False
    with monkeypatch.context() as context:
        context.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(DestinationError, match="No space"), AtomicDirectory(tmp_path / "x", resume=True):
            pass
    with AtomicDirectory(tmp_path / "x", resume=True) as directory:
        assert [path.name for path in directory.path.iterdir()] == ["complete"]
