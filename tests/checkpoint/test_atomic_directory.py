"""The directory that everything is written in: what its users' own tests do not reach."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_megatron.checkpoint import AtomicDirectory, renaming, write_lock
from hf_megatron.checkpoint.atomic_directory import leftovers, recover, remove
from hf_megatron.checkpoint.write_lock import MARK
from hf_megatron.errors import DestinationError


def _fill(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def _is_kept(entry: Path) -> bool:
    return entry.name != "weights"


def _killed(destination: Path) -> Path:
    """What a process leaves that is killed when it begins to write ``destination``: the hidden directory."""
    directory = AtomicDirectory(destination)
    directory.__enter__()
    lock = directory._lock
    assert lock is not None
    lock.release()
    return directory.container


def test_what_is_kept_is_there_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tokenizer that is lost with the old weights when a process is killed right after the renames."""
    _fill(tmp_path / "model", weights="old", config="old", tokenizer="old")
    _fill(tmp_path / "model/runs/one", log="old")
    monkeypatch.setattr(AtomicDirectory, "_end", lambda self: None)  # which deletes what was there before
    with AtomicDirectory(tmp_path / "model", keep=_is_kept) as fresh:
        _fill(fresh.path, weights="new", config="new")
        fresh.publish()
    found = {path.name: path.read_text() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert found == {"weights": "new", "config": "new", "tokenizer": "old", "log": "old"}
    assert recover(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/runs/one/log").read_text() == "old"


@pytest.mark.parametrize("has_exchange", [True, False])
def test_replacing_without_the_exchange_of_linux(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_exchange: bool
) -> None:
    """Catches a system or file system without renameat2 on which nothing can be overwritten."""
    if not has_exchange:
        monkeypatch.setattr(renaming, "exchange", lambda a, b: False)
    _fill(tmp_path / "model", weights="old")
    with AtomicDirectory(tmp_path / "model") as fresh:
        _fill(fresh.path, weights="new")
        fresh.publish()
    assert (tmp_path / "model/weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_killed_between_two_renames_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an old directory that stays hidden for ever, or is deleted while it is the only one there is."""
    model = _fill(tmp_path / "model", weights="old")
    container = _killed(model)
    model.rename(container / "model.replaced")
    assert leftovers(model) == [container]
    with pytest.raises(DestinationError, match="exists"), AtomicDirectory(model, replace=False):
        pass
    assert recover(model)
    assert (model / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("name", [".model.incomplete", ".model.replaced"])
def test_a_directory_of_the_users_is_never_touched(tmp_path: Path, name: str) -> None:
    """Catches a name that is taken for a mark: the user's directory deleted, renamed, or written into."""
    _fill(tmp_path / name, weights="mine")
    _fill(tmp_path / "model", weights="old")
    before = sorted((path, path.read_bytes() if path.is_file() else b"") for path in tmp_path.rglob("*"))
    assert recover(tmp_path / "model")
    if name == ".model.incomplete":
        with pytest.raises(DestinationError, match=r"\.model\.incomplete is in the way"):
            AtomicDirectory(tmp_path / "model").__enter__()
        assert sorted((p, p.read_bytes() if p.is_file() else b"") for p in tmp_path.rglob("*")) == before
        return
    with AtomicDirectory(tmp_path / "model") as fresh:
        _fill(fresh.path, weights="new")
        fresh.publish()
    assert (tmp_path / name / "weights").read_text() == "mine"


def _as_of_another_host(container: Path, age: float) -> None:
    mark = container / MARK
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "host": "elsewhere", "pid": 17}))
    os.utime(mark, (time.time() - age,) * 2)


def test_another_host_is_left_in_peace_while_it_lives(tmp_path: Path) -> None:
    """Catches two hosts on one network file system that delete each other's files, and a dead one that blocks all."""
    container = _killed(tmp_path / "model")
    _fill(container / "model", weights="half")
    _as_of_another_host(container, age=5)
    with pytest.raises(DestinationError, match=r"process 17 on elsewhere.*5 seconds.*remove"):
        AtomicDirectory(tmp_path / "model").__enter__()
    assert not recover(tmp_path / "model")
    assert (container / "model/weights").read_text() == "half"
    _as_of_another_host(container, age=500)
    with AtomicDirectory(tmp_path / "model") as fresh:
        assert list(fresh.path.iterdir()) == []
        fresh.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_another_host_has_taken_over_is_not_published(tmp_path: Path) -> None:
    """Catches half of another host's files published by one that was suspended for a while."""
    with AtomicDirectory(tmp_path / "model") as fresh:
        _as_of_another_host(fresh.container, age=0)
        _fill(fresh.path, weights="of the other")
        with pytest.raises(DestinationError, match="taken over"):
            fresh.publish()
    assert (fresh.path / "weights").read_text() == "of the other"
    assert not (tmp_path / "model").exists()


def test_the_writer_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a long conversion that another host takes for dead."""
    monkeypatch.setattr(write_lock, "_BEAT_SECONDS", 0.01)
    with AtomicDirectory(tmp_path / "model") as fresh:
        _as_of_another_host(fresh.container, age=500)
        deadline = time.monotonic() + 10
        while (fresh.container / MARK).stat().st_mtime < time.time() - 100:
            assert time.monotonic() < deadline, "no sign of life"
            time.sleep(0.01)


def test_a_removal_that_is_killed_is_finished_by_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the mark deleted before what it marks, which nobody would dare to clean up then."""
    unlinked = Path.unlink

    def killed(path: Path, **options: bool) -> None:
        assert path.name != MARK or [entry.name for entry in path.parent.iterdir()] == [MARK]
        unlinked(path, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    _fill(tmp_path / "model", weights="old")
    with AtomicDirectory(tmp_path / "model") as fresh:
        _fill(fresh.path, weights="new")
        fresh.publish()
    (tmp_path / ".model.incomplete").mkdir()  # killed between the mark and its directory
    remove(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


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


def test_without_locks_a_living_process_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process that removes another one's files on a file system without locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with AtomicDirectory(tmp_path / "model") as first:
        with pytest.raises(DestinationError, match=f"process {os.getpid()} on"):
            AtomicDirectory(tmp_path / "model").__enter__()
        _fill(first.path, weights="new")
        first.publish()
    assert (tmp_path / "model/weights").read_text() == "new"


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


def test_a_link_in_what_was_left_is_not_followed(tmp_path: Path) -> None:
    """Catches work that goes on in a directory of somebody else's, where it deletes what it does not know."""
    outside, container = tmp_path / "outside", tmp_path / ".new.incomplete"
    for path in (outside, container):
        path.mkdir()
    (container / MARK).touch()
    (container / "new").symlink_to(outside)
    with AtomicDirectory(tmp_path / "new", resume=True) as directory:
        (directory.path / "file").touch()
        directory.publish()
    assert (list(outside.iterdir()), (tmp_path / "new").is_symlink()) == ([], False)


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


def test_new_parents_are_on_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a checkpoint whose run directory is lost with the power, while the one before is deleted already."""
    on_disk: set[int] = set()
    with AtomicDirectory(tmp_path / "runs/first/checkpoint-1") as fresh:
        _fill(fresh.path, weights="new")
        monkeypatch.setattr(os, "fsync", lambda descriptor: on_disk.add(os.fstat(descriptor).st_ino))
        fresh.publish()
    assert {path.stat().st_ino for path in (tmp_path, tmp_path / "runs", tmp_path / "runs/first")} <= on_disk


@pytest.mark.parametrize("merge", [False, True])
def test_everything_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: bool
) -> None:
    """Catches files without their bytes under a checkpoint's name, after the machine went down."""
    on_disk: set[int] = set()
    named: list[int] = []
    renamed: list[Path] = []

    def note_and_do(rename: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
        def noting(path: Path, target: Path) -> object:
            renamed.append(path)
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
        monkeypatch.setattr(renaming, "exchange", note_and_do(renaming.exchange))
        fresh.publish(merge=merge)
    assert renamed
    assert set(named) <= old, "renamed before they were on disk"
    assert (tmp_path / "model" if merge else tmp_path).stat().st_ino in on_disk, "the new names are not"
