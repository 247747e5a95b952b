"""A source that changes while it is converted: nothing is published, and nothing that was there is lost."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_megatron.errors import CheckpointError, CheckpointIncompleteError, DestinationError
from hf_megatron_conversion import convert, converter
from tests.conversion.checkpoints import directory_bytes, flipped


class _Meanwhile:
    """Progress that does something when writing starts, after everything was planned."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def begin(self, task: str, total_bytes: int) -> None:
        self._action()

    def advance(self, num_bytes: int) -> None:
        pass


def _replace(path: Path) -> None:
    """Another file of the same size and time under the same name."""
    status = path.stat()
    new = path.with_name("new")
    new.write_bytes(flipped(path, -1))
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(path)


def _write_to(path: Path) -> None:
    path.write_bytes(flipped(path, -1))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _append_to(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def _touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


_CHANGES: dict[str, Callable[[Path], object]] = {
    "replaced": _replace,
    "written to": _write_to,
    "truncated": _truncate,
    "appended to": _append_to,
    "touched": _touch,
    "removed": Path.unlink,
}
_CODE = '{"auto_map": {"AutoTokenizer": ["evil--code.Tokenizer", null]}, "model_max_length": 32}'
_TP: dict[str, Any] = {"to": "tp", "tp_size": 2}
_CASES = [
    ("hub", "model.safetensors", _TP),
    ("hub", "model.safetensors", {"to": "hub"}),  # which copies it
    ("hub", "config.json", _TP),
    ("hub", "generation_config.json", _TP),  # which is copied
    ("hub", "tokenizer_config.json", _TP),  # of which a part is left out
    ("hub", "README.md", _TP),  # which becomes a part of the new one
    ("megatron-lm", "release/mp_rank_01/model_optim_rng.pt", {"to": "hub"}),
    ("tp", "shard-00002-model-00001-of-00001.safetensors", {"to": "hub"}),
]


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize(("kind", "name", "to"), _CASES)
def test_a_source_that_changes_is_not_converted(
    kind: Any, name: str, to: dict[str, Any], change: str, tied: Path, tmp_path: Path
) -> None:
    """Catches offsets of the planned file used in another one: every tensor is another's, and --verify is happy."""
    source, destination = tmp_path / "source", tmp_path / "out"
    convert(tied, source, to=kind, tp_size=None if kind == "hub" else 2)
    (source / "tokenizer_config.json").write_text(_CODE)
    before = (source / name).read_bytes()
    meanwhile = _Meanwhile(lambda: _CHANGES[change](source / name))
    with pytest.raises(CheckpointIncompleteError, match=rf"{re.escape(name)} (was|became)"):
        convert(source, destination, progress=meanwhile, **to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (source / name).write_bytes(before)
    convert(source, destination, **to)
    assert (destination / "config.json").is_file()


@pytest.mark.parametrize("change", _CHANGES)
def test_a_file_that_changes_at_the_end_is_noticed_before_publishing(
    change: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check at opening alone: what changes after the last opening may have changed between two before it."""

    def write_sums(directory: Path, digests: object) -> None:
        _CHANGES[change](source / "model.safetensors")

    monkeypatch.setattr(converter, "write_sums", write_sums)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        convert(source, tmp_path / "tp", to="tp", tp_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_directory_that_appears_in_the_destination(
    untied: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a look at the destination before the work alone: hours later a training run may have written there."""
    destination = tmp_path / "tp"
    convert(untied, destination, to="tp", tp_size=3)

    def write_sums(directory: Path, digests: object) -> None:
        (destination / "checkpoint-500").mkdir()

    monkeypatch.setattr(converter, "write_sums", write_sums)
    with pytest.raises(DestinationError, match=r"holds directories \(checkpoint-500\)"):
        convert(source, destination, to="tp", tp_size=2, overwrite=True)
    assert (destination / "checkpoint-500").is_dir()
    assert len(list(destination.glob("shard-*"))) == 3


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("resume", [False, True])
def test_a_source_that_changes_leaves_the_old_destination(
    resume: bool, change: str, untied: Path, source: Path, tmp_path: Path
) -> None:
    """Catches an --overwrite that has taken the old one away before the source was seen to change."""
    destination = tmp_path / "tp"
    convert(untied, destination, to="tp", tp_size=3)
    before = directory_bytes(destination)
    whole = (source / "model.safetensors").read_bytes()
    meanwhile = _Meanwhile(lambda: _CHANGES[change](source / "model.safetensors"))
    with pytest.raises(CheckpointIncompleteError, match=r"model\.safetensors (was|became)"):
        convert(source, destination, progress=meanwhile, overwrite=True, resume=resume, **_TP)
    assert directory_bytes(destination) == before
    (source / "model.safetensors").write_bytes(whole)
    convert(source, destination, overwrite=True, resume=resume, **_TP)
    convert(source, tmp_path / "expected", **_TP)
    assert directory_bytes(destination) == directory_bytes(tmp_path / "expected")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "tp", "expected"}
