"""Put a new directory in the place of an old one, so that neither a kill nor a power cut loses both."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CONFIG = "config.json"  # without it nothing loads: the first to go, the last to come


def sync(*paths: Path) -> None:
    """Flush files and directory entries to disk (fsync)."""
    for path in paths:
        if not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two directories in one step (renameat2, of Linux); False if the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(b))


def can_rename(directory: Path, occupied: Path) -> bool:
    """Whether a directory could be renamed to where ``occupied`` lies, which is not empty; nothing is changed.

    It cannot if it is a mount point, or comes from a lower layer of an overlay. OSError if it is not allowed to.
    """
    try:
        directory.rename(occupied)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EXDEV):
            return False
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    return True


def replace_directory(new: Path, old: Path) -> None:
    """Give a directory the place of another one, which may be absent; what was there lies beside ``new`` then."""
    if old.exists() and exchange(new, old):
        return
    aside = _aside(new)
    try:
        if old.exists():
            old.rename(aside)
        new.rename(old)
    except BaseException:
        if aside.exists() and not old.exists():
            aside.rename(old)
        raise


def replace_files(new: Path, old: Path, keep: Callable[[Path], bool]) -> None:
    """The same, file by file, where ``old`` cannot be renamed; the directory of ``new`` may lie in it.

    Until the last file has gone nothing has arrived, and then all of them do, if need be in the next process.
    """
    aside = _aside(new)
    aside.mkdir()
    staying = {new.parent.name, *(e.name for e in old.iterdir() if keep(e) and not (new / e.name).exists())}
    files = [path for path in _files(old) if path.relative_to(old).parts[0] not in staying]
    for path in sorted(files, key=lambda path: path.name != _CONFIG):
        move(path, aside / path.relative_to(old))
    _arriving(new).touch()
    sync(_arriving(new), new.parent, aside, old)
    _arrive(new, old)


def undo_or_finish(new: Path, old: Path) -> None:
    """Bring back what a process was killed replacing, or if all of that had gone already, move the rest of the new."""
    if not _aside(new).is_dir():
        return
    if new.parent.parent != old:
        if not old.exists():
            _aside(new).rename(old)
    elif _arriving(new).exists():
        _arrive(new, old)
    else:
        _arrive(_aside(new), old)


def _aside(new: Path) -> Path:
    """Where what is replaced waits for its deletion."""
    return new.with_name(f"{new.name}.replaced")


def _arriving(new: Path) -> Path:
    """What says that all that is replaced has gone there."""
    return new.with_name(f"{new.name}.arriving")


def move(path: Path, target: Path) -> None:
    """Rename a file, into a directory that is made if need be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)


def _arrive(source: Path, target: Path) -> None:
    for directory in sorted(target.rglob("*"), reverse=True):  # those whose files have gone
        if directory.is_dir() and not directory.is_symlink() and not any(directory.iterdir()):
            directory.rmdir()
    files = sorted(_files(source), key=lambda path: path.name == _CONFIG)
    for path in files:
        move(path, target / path.relative_to(source))
    sync(*{(target / path.relative_to(source)).parent for path in files}, target)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())


def link_tree(source: Path, target: Path) -> None:
    """The same file or directory under a second name, or a copy where there are no hard links."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
