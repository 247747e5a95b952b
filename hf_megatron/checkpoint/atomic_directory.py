"""A directory that is complete or not there, whatever happens to the processes that write it.

It is written under a hidden name beside its destination, ``.NAME.incomplete``, and renamed when all of it is on disk. A
destination that it replaces is first renamed to ``.NAME.replaced``, and removed in the end. What killed processes leave
under these two names, and nothing else, is removed or put back before the destination is written again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Self

from hf_megatron.errors import DestinationError


class AtomicDirectory:
    """A destination being written. Leaving the context without ``publish`` removes what was written.

        with AtomicDirectory(destination) as directory:
            (directory.path / "file").write_text("...")
            directory.publish()

    Ranks that write one together make an instance each and call the same methods. A destination that is itself the
    hidden directory of another instance is part of that, and written as it is.

    Args:
        destination: The directory to write; symbolic links are resolved.
        replace: Whether one that exists may be replaced.
        keep: Which entries of a replaced directory move into the new one, unless that has its own.
        is_first: Whether this process creates and publishes.
        meet: Of several ranks: waits for all; takes this one's error, and raises on all if there is one.

    Raises:
        DestinationError: The destination exists and may not be replaced, or is not a directory.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        *,
        replace: bool = True,
        keep: Callable[[Path], bool] = lambda entry: False,
        is_first: bool = True,
        meet: Callable[[Exception | None], None] | None = None,
    ) -> None:
        self.destination = Path(destination).resolve()
        self._replace, self._keep, self._is_first, self._meet = replace, keep, is_first, meet
        self._is_part = self.destination.name.startswith(".") and self.destination.suffix == ".incomplete"
        self.path = self.destination if self._is_part else _hidden(self.destination, "incomplete")  # where to write
        self._is_to_remove = False
        self._lock: int | None = None
        self._new_parents: list[Path] = []
        self._check_destination()

    def __enter__(self) -> Self:
        """Clear away what killed processes left, and create the directory; DestinationError if one is being written."""
        try:
            self._on_first(self._create)
        except BaseException:
            self.__exit__()
            raise
        self._is_to_remove = not self._is_part
        return self

    def require_space(self, num_bytes: int) -> None:
        """Raise DestinationError if fewer bytes are free."""
        if (free := shutil.disk_usage(self.path).free) < num_bytes:
            raise DestinationError(
                f"{self.destination.parent} has {free:,} bytes of free space, {num_bytes:,} are needed; nothing was "
                "written."
            )

    def publish(self, *, merge: bool = False) -> None:
        """Give the directory its name; with ``merge``, move its files one by one into a destination that exists."""
        self._settle()  # every rank has written its part
        self._on_first(self._move_files if merge and self.destination.exists() else self._swap)
        self._is_to_remove = False

    def __exit__(self, *exception: object) -> None:
        if self._is_to_remove:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for parent in self._new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def _on_first(self, action: Callable[[], None]) -> None:
        error = None
        try:
            if self._is_first and not self._is_part:
                action()
        except Exception as caught:
            error = caught
        self._settle(error)

    def _settle(self, error: Exception | None = None) -> None:
        if self._meet is not None:
            self._meet(error)
        elif error is not None:
            raise error

    def _check_destination(self) -> None:
        place = f"The destination {self.destination}"
        if self.destination.exists() and not self._replace:
            raise DestinationError(f"{place} exists; choose another, or overwrite it (--overwrite).")
        if self.destination.exists() and not self.destination.is_dir():
            raise DestinationError(f"{place} is not a directory; remove it first.")

    def _is_taken(self) -> DestinationError:
        return DestinationError(f"Another process is writing {self.destination} (in {self.path}).")

    def _create(self) -> None:
        parent = self.destination.parent
        self._new_parents = [path for path in (parent, *parent.parents) if not path.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        if recover(self.destination, self._keep):
            self._check_destination()
            self.path.mkdir()
            self._lock = _lock(self.path)
        if self._lock is None:
            raise self._is_taken()
        self._is_to_remove = True

    def _swap(self) -> None:
        _sync(*self.path.rglob("*"), self.path)
        self._check_destination()
        assert self._lock is not None
        if not os.path.samestat(os.fstat(self._lock), self.path.stat()):  # where there are no locks
            raise self._is_taken()
        old = _hidden(self.destination, "replaced")
        try:
            if self.destination.exists():
                self.destination.rename(old)
            self.path.rename(self.destination)
        except BaseException:
            if old.exists() and not self.destination.exists():
                old.rename(self.destination)
            raise
        _sync(self.destination.parent)
        self._new_parents.clear()
        _clear_replaced(self.destination, self._keep)

    def _move_files(self) -> None:
        files = [path for path in self.path.rglob("*") if path.is_file()]
        _sync(*files)
        for path in sorted(files):
            target = self.destination / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            _sync(target.parent)
        shutil.rmtree(self.path)


def recover(destination: Path, keep: Callable[[Path], bool] = lambda entry: False) -> bool:
    """Clear away what killed processes left beside ``destination``, or put it back; False if one is being written."""
    incomplete = _hidden(destination, "incomplete")
    if incomplete.is_dir():
        lock = _lock(incomplete)
        if lock is None:
            return False
        shutil.rmtree(incomplete, ignore_errors=True)
        os.close(lock)
    _clear_replaced(destination, keep)
    return True


def _clear_replaced(destination: Path, keep: Callable[[Path], bool]) -> None:
    old = _hidden(destination, "replaced")
    if old.is_dir() and not destination.exists():
        old.rename(destination)  # killed between the two renames
    elif old.is_dir():
        for entry in old.iterdir():
            if keep(entry) and not (destination / entry.name).exists():
                entry.rename(destination / entry.name)
        shutil.rmtree(old, ignore_errors=True)


def remove(directory: Path) -> None:
    """Remove a directory that nobody may take for a complete one while some of its files are gone."""
    shutil.rmtree(directory.rename(_hidden(directory, "incomplete")), ignore_errors=True)


def _hidden(destination: Path, what: str) -> Path:
    return destination.with_name(f".{destination.name}.{what}")


def _lock(directory: Path) -> int | None:
    """An open descriptor that holds the directory's lock until it is closed or the process ends; None if it is held."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # NFS, among others, does not lock directories; there what is found counts as abandoned
    return descriptor


def _sync(*paths: Path) -> None:
    """Have the kernel write files, and the entries of directories, to disk."""
    for path in paths:
        if not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
