"""The directory that everything is written in: what its users' own tests do not reach."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_megatron.checkpoint import AtomicDirectory
from hf_megatron.checkpoint.atomic_directory import recover
from hf_megatron.errors import DestinationError


def _fill(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def _is_kept(entry: Path) -> bool:
    return entry.name != "weights"


def test_what_a_killed_publish_had_not_moved_is_moved_later(tmp_path: Path) -> None:
    """Catches a tokenizer that is lost with the old weights when a process is killed after the renames."""
    model = _fill(tmp_path / "model", weights="new", config="new")
    _fill(tmp_path / ".model.replaced", weights="old", config="old", tokenizer="old")
    assert recover(model, _is_kept)
    assert {path.name: path.read_text() for path in model.iterdir()} == {
        "weights": "new",
        "config": "new",
        "tokenizer": "old",
    }
    assert list(tmp_path.iterdir()) == [model]


def test_names_of_others_are_left_alone(tmp_path: Path) -> None:
    """Catches a backup of the user's that is taken for what a killed process left."""
    for name in (".model.old", ".model.tmp", ".model2.incomplete", "model.incomplete", ".model"):
        _fill(tmp_path / name, weights="mine")
    before = sorted(tmp_path.rglob("*"))
    with AtomicDirectory(tmp_path / "model"):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_merge_keeps_the_directory_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a current directory that is replaced under its user, and a subdirectory's other files lost."""
    model = _fill(tmp_path / "model", weights="old", notes="mine")
    _fill(model / "adapter", notes="mine", weights="old")
    monkeypatch.chdir(model)
    with AtomicDirectory(".") as fresh:
        _fill(fresh.path, weights="new")
        _fill(fresh.path / "adapter", weights="new")
        fresh.publish(merge=True)
    assert (Path.cwd() / "weights").read_text() == (model / "adapter/weights").read_text() == "new"
    assert (model / "notes").read_text() == (model / "adapter/notes").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [model]


def _break_off(destination: Path) -> None:
    with AtomicDirectory(destination) as fresh:
        _fill(fresh.path, half="")
        raise KeyboardInterrupt


def test_one_inside_another_is_part_of_it(tmp_path: Path) -> None:
    """Catches a save inside a checkpoint that takes the locked directory's place, or removes it when it fails."""
    with AtomicDirectory(tmp_path / "outer") as outer:
        with pytest.raises(KeyboardInterrupt):
            _break_off(outer.path)
        with AtomicDirectory(outer.path) as inner:
            _fill(inner.path, whole="")
            inner.publish()
        assert [path.name for path in tmp_path.iterdir()] == [".outer.incomplete"]
        outer.publish()
    assert sorted(path.name for path in (tmp_path / "outer").iterdir()) == ["half", "whole"]


def test_without_locks_another_process_is_noticed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half of another process's files published, on a file system that does not lock directories (NFS)."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with AtomicDirectory(tmp_path / "model") as first:
        first.path.rename(tmp_path / "elsewhere")  # removed, rather, and created anew by the second process
        _fill(first.path, half="of the second")
        with pytest.raises(DestinationError, match="Another process"):
            first.publish()
    assert not (tmp_path / "model").exists()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """Catches a link to another disk that a directory takes the place of."""
    _fill(tmp_path / "disk/model", weights="old")
    (tmp_path / "model").symlink_to(tmp_path / "disk/model")
    with AtomicDirectory(tmp_path / "model") as fresh:
        _fill(fresh.path, weights="new")
        fresh.publish()
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "disk/model/weights").read_text() == "new"
    assert len(list((tmp_path / "disk").iterdir())) == 1


def test_a_failure_of_the_first_rank_is_handed_to_all(tmp_path: Path) -> None:
    """Catches ranks that wait for ever for a first one that could not begin, and another process's files removed."""
    errors: list[Exception | None] = []

    def meet(error: Exception | None) -> None:
        errors.append(error)
        if error is not None:
            raise error

    with AtomicDirectory(tmp_path / "model") as holder:
        with pytest.raises(DestinationError, match="Another process"):
            AtomicDirectory(tmp_path / "model", meet=meet).__enter__()
        assert holder.path.is_dir()
    assert len(errors) == 1


def test_the_first_rank_waits_for_the_others_before_it_publishes(tmp_path: Path) -> None:
    """Catches a directory that has its name before all ranks have written their part, or that some do not find."""
    there: list[list[str]] = []

    def meet(error: Exception | None) -> None:
        there.append([path.name for path in tmp_path.iterdir()])

    with AtomicDirectory(tmp_path / "model", meet=meet) as fresh:
        there.clear()
        fresh.publish()
    assert there == [[".model.incomplete"], ["model"]]


@pytest.mark.parametrize("merge", [False, True])
def test_everything_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: bool
) -> None:
    """Catches files without their bytes under a checkpoint's name, after the machine went down."""
    on_disk: set[int] = set()
    named: list[int] = []

    def note_and_do(rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def noting(path: Path, target: Path) -> Path:
            named.extend(p.stat().st_ino for p in (path, *path.rglob("*")) if p.stat().st_ino not in on_disk)
            return rename(path, target)

        return noting

    _fill(tmp_path / "model", notes="mine")
    with AtomicDirectory(tmp_path / "model") as fresh:
        _fill(fresh.path, weights="new")
        _fill(fresh.path / "adapter", weights="new")
        old = {path.stat().st_ino for path in (tmp_path / "model", tmp_path / "model/notes")}
        monkeypatch.setattr(os, "fsync", lambda descriptor: on_disk.add(os.fstat(descriptor).st_ino))
        for name in ("rename", "replace"):
            monkeypatch.setattr(Path, name, note_and_do(getattr(Path, name)))
        fresh.publish(merge=merge)
    assert set(named) <= old, "renamed before they were on disk"
    assert (tmp_path / "model" if merge else tmp_path).stat().st_ino in on_disk, "the new names are not"
