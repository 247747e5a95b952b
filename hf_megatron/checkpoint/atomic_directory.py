"""Atomic directory writes: the destination is either complete or absent, even if writing processes are killed.

The directory is written under a hidden name next to the destination, ``.NAME.incomplete``, and renamed once all of it
is on disk. An existing destination is first renamed to ``.NAME.replaced`` and deleted at the end. The next write to the
same destination cleans up what killed processes left under these two names, and touches nothing else.
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
    """Context manager that writes a directory atomically. Without ``publish``, leaving the context deletes it.

        with AtomicDirectory(destination) as directory:
            (directory.path / "file").write_text("...")
            directory.publish()

    Ranks that write one directory together each create an instance and call the same methods. If the destination is
    itself the hidden directory of another instance, it is part of that one and is written directly.

    Args:
        destination: The directory to write; symbolic links are resolved.
        replace: Whether one that exists may be replaced.
        keep: Which entries of a replaced directory to move into the new one, unless it has entries of the same name.
        is_first: Whether this process creates and publishes.
        meet: With several ranks, a barrier that takes this rank's error and raises on all ranks if any has one.

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
        """Clean up after killed processes and create the directory; DestinationError if it is being written now."""
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
        """Rename the directory to its destination; with ``merge``, move its files into an existing destination."""
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
    """Clean up or restore what killed processes left next to ``destination``; False if it is being written now."""
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
    """Delete a directory so that a partly deleted one is never mistaken for a complete one: rename it first."""
    shutil.rmtree(directory.rename(_hidden(directory, "incomplete")), ignore_errors=True)


def _hidden(destination: Path, what: str) -> Path:
    return destination.with_name(f".{destination.name}.{what}")


def _lock(directory: Path) -> int | None:
    """Lock the directory: a descriptor that holds the lock until closed, or None if another process holds it."""
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
    """Flush files and directory entries to disk (fsync)."""
    for path in paths:
        if not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
