"""Conversions that are killed, anywhere, again and again: the old or the new is there, whole, and the next one works.

``HF_MEGATRON_KILLS=200`` makes it so many.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hf_megatron.errors import DestinationError
from hf_megatron_conversion import convert, files
from tests.conversion.checkpoints import directory_bytes, tp_entries
from tests.repository import environment

_NUM_KILLS = int(os.environ.get("HF_MEGATRON_KILLS", "5"))

# The command line, which kills itself at its n-th call of what changes the file system.
_KILLED_AT_CALL = """
import os, shutil, signal, sys
from pathlib import Path
from hf_megatron.checkpoint import renaming, write_lock
from hf_megatron.commands import cli

limit, has_exchange = int(sys.argv.pop()), int(sys.argv.pop())
calls = 0

def killing(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for owner, names in ((os, "fsync link rename unlink rmdir mkdir"), (Path, "rename replace unlink rmdir mkdir touch")):
    for name in names.split():
        setattr(owner, name, killing(getattr(owner, name)))
renaming.exchange = killing(renaming.exchange) if has_exchange else lambda a, b: False
cli.main()
"""

# The command line, which is slow: what is read and written takes a millisecond each time.
_SLOW = """
import sys, time
from hf_megatron.commands import cli, console

class Slow:
    def __init__(self, bars): pass
    def begin(self, task, total_bytes): print("begun", flush=True)
    def advance(self, num_bytes): time.sleep(0.001)

console.ProgressBar = Slow
cli.main()
"""


def _start(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(HF_MEGATRON_REGISTER="0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def versions(tied: Path, untied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the destination may hold: the old one or the new one, by what a tp directory holds."""
    directory = tmp_path_factory.mktemp("versions")
    convert(untied, directory / "old", to="tp", tp_size=2)
    convert(tied, directory / "new", to="tp", tp_size=4)
    return {name: (directory / name, tp_entries(directory / name)) for name in ("old", "new")}


def _reset(destination: Path, versions: dict[str, Any]) -> None:
    if destination.is_dir():
        shutil.rmtree(destination)
    shutil.copytree(versions["old"][0], destination)


def _version(destination: Path, versions: dict[str, Any]) -> str:
    """Which of the two it is; all files have to be there, and no others."""
    for name, (directory, entries) in versions.items():
        is_complete = {path.name for path in destination.iterdir()} == {path.name for path in directory.iterdir()}
        if is_complete and tp_entries(destination) == entries:
            return name
    raise AssertionError(f"neither the old one nor the new one: {sorted(destination.iterdir())}")


@pytest.mark.timeout(1800)
def test_killed_at_random_moments(tied: Path, tmp_path: Path, versions: dict[str, Any]) -> None:
    """Catches any moment at which a kill -9 leaves half a checkpoint, nothing, or what blocks the next conversion."""
    destination, chance = tmp_path / "tp", random.Random(0)
    _reset(destination, versions)
    found = []
    for _ in range(_NUM_KILLS):
        resume = chance.choice([[], ["--resume"]])
        process = _start(_SLOW, "convert", tied, destination, "--to", "tp", "--tp", 4, "--overwrite", *resume)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.communicate()
        found.append(_version(destination, versions))
        if found[-1] == "new":
            _reset(destination, versions)
    convert(tied, destination, to="tp", tp_size=4, overwrite=True)
    assert _version(destination, versions) == "new"
    assert list(tmp_path.iterdir()) == [destination]
    assert "old" in found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("has_exchange", [True, False])
def test_killed_at_every_step_of_publishing(
    tied: Path, tmp_path: Path, versions: dict[str, Any], has_exchange: bool
) -> None:
    """Catches the few microseconds that a random kill hardly ever hits: between two renames, or two deletions."""
    destination, chance = tmp_path / "tp", random.Random(0)
    _reset(destination, versions)
    process = _start(_KILLED_AT_CALL, "convert", tied, tmp_path / "x", "--to", "tp", "--tp=4", int(has_exchange), 10**9)
    process.communicate()
    shutil.rmtree(tmp_path / "x")
    found = []
    steps = list(range(1, 40)) if _NUM_KILLS > 100 else sorted(chance.sample(range(1, 36), _NUM_KILLS))
    for step in steps:
        arguments = ["convert", tied, destination, "--to", "tp", "--tp=4", "--overwrite", int(has_exchange), step]
        process = _start(_KILLED_AT_CALL, *arguments)
        process.communicate()
        if process.returncode == 0:
            found.append("done")
        elif not destination.exists():
            assert not has_exchange, f"step {step}: nothing is at the destination"
            found.append("between")
            with pytest.raises(DestinationError, match="exists"):  # the next one brings it back first
                convert(tied, destination, to="tp", tp_size=4)
            assert _version(destination, versions) == "old"
        else:
            found.append(_version(destination, versions))
        convert(tied, destination, to="tp", tp_size=4, overwrite=True)
        assert _version(destination, versions) == "new"
        assert list(tmp_path.iterdir()) == [destination]
        _reset(destination, versions)
    assert found[0] == "old"


def _files_of_killed(tied: Path, destination: Path) -> Path:
    """A conversion that is killed when its third file is complete: the directory that it wrote in."""
    code = """
import os, signal, sys
from hf_megatron.commands import cli
from hf_megatron_conversion import journal
os.sched_getaffinity = lambda _: {0}
add, files = journal.Journal.add, []
def counting(self, name, digest):
    add(self, name, digest)
    files.append(name)
    if len(files) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.add = counting
cli.main()
"""
    process = _start(code, "convert", tied, destination, "--to", "tp", "--tp", 6)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return destination.parent / f".{destination.name}.incomplete" / destination.name


@pytest.mark.parametrize("change", ["nothing", "a flipped bit", "a stray file", "the source", "the options"])
def test_resume_keeps_what_is_complete(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Catches --resume that starts anew, or that keeps damaged files, or those of another source or other options."""
    source, destination = Path(shutil.copytree(tied, tmp_path / "source")), tmp_path / "tp"
    convert(source, tmp_path / "expected", to="tp", tp_size=6)
    directory = _files_of_killed(source, destination)
    kept = sorted(path.name for path in directory.iterdir())[:3]
    first = directory / kept[0]
    match change:
        case "a flipped bit":
            data = bytearray(first.read_bytes())
            data[-1] ^= 1
            first.write_bytes(data)
        case "a stray file":
            (directory / "pytorch_model.bin").write_text("")
        case "the source":
            (source / "model.safetensors").touch()
        case "the options":
            pass
    write, written = files._write, []

    def noting(file: Any, *arguments: Any) -> str:
        written.append(file.path)
        return write(file, *arguments)

    monkeypatch.setattr(files, "_write", noting)
    dtype = "float64" if change == "the options" else None
    result = convert(source, destination, to="tp", tp_size=6, resume=True, dtype=dtype)
    shards = {name for name in written if name.startswith("shard")}
    all_shards = {name for name in result.files if name.startswith("shard")}
    if change in ("nothing", "a stray file"):
        assert shards == all_shards - set(kept)
    elif change == "a flipped bit":
        assert shards == all_shards - set(kept[1:])
    else:
        assert shards == all_shards
    if change != "the options":
        assert directory_bytes(destination) == directory_bytes(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "source", "tp"]


@pytest.mark.parametrize("damage", ["bytes", "a link", "a list that is a link", "a list that is a pipe"])
def test_resume_after_another_format(tied: Path, tmp_path: Path, damage: str) -> None:
    """Catches directories of the earlier format in the result, and a damaged list of what is complete."""
    stage = _files_of_killed(tied, tmp_path / "out")
    (stage / "release/mp_rank_00").mkdir(parents=True)
    (stage / "release/mp_rank_00/model_optim_rng.pt").write_bytes(b"x")
    journal, elsewhere = stage.parent / "journal", tmp_path / "elsewhere"
    elsewhere.write_bytes(b"mine")
    if damage == "bytes":
        journal.write_bytes(journal.read_bytes() + b"\xff\xfe\n")
    elif damage == "a link":
        (stage / "link").symlink_to(elsewhere)
    else:
        journal.unlink()
        journal.symlink_to(elsewhere) if damage.endswith("link") else os.mkfifo(journal)
    convert(tied, tmp_path / "out", to="hub", resume=True)
    convert(tied, tmp_path / "expected", to="hub")
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert elsewhere.read_bytes() == b"mine"


def test_what_a_killed_conversion_left_is_no_source(tied: Path, tmp_path: Path) -> None:
    """Catches a source that is cleaned up while it is read."""
    stage = _files_of_killed(tied, tmp_path / "tp")
    with pytest.raises(DestinationError, match="overlap"):
        convert(stage, tmp_path / "tp", to="hub")
    assert stage.is_dir()


def test_without_resume_nothing_is_kept(tied: Path, tmp_path: Path) -> None:
    """Catches files of an earlier conversion in a result that was not to have any."""
    directory = _files_of_killed(tied, tmp_path / "tp")
    (directory / "stray").write_text("")
    convert(tied, tmp_path / "tp", to="hub")
    assert {path.name for path in (tmp_path / "tp").iterdir()} >= {"model.safetensors", "SHA256SUMS"}
    assert not list((tmp_path / "tp").glob("s*"))


def test_an_interrupted_conversion_that_may_be_resumed_is(tied: Path, tmp_path: Path) -> None:
    """Catches --resume that cleans up when a scheduler's SIGTERM ends it, which is when it is needed."""
    process = _start(_SLOW, "convert", tied, tmp_path / "tp", "--to", "tp", "--tp", 12, "--resume", "--json")
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob(".tp.incomplete/tp/shard*"))) < 4:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 130
    assert "error" in json.loads(out.splitlines()[-1])
    assert "--resume" in err
    assert (tmp_path / ".tp.incomplete/tp").is_dir()
    convert(tied, tmp_path / "tp", to="tp", tp_size=12, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tp"]
