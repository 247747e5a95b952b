"""A destination that is complete or not there.

Everything is written into a hidden directory beside the destination, which is renamed when it is complete and on disk.
A process that is killed leaves at most that directory; the next conversion to the same destination removes it. A lock,
which the kernel drops with the process, tells an abandoned one from one that is being written.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from glob import escape
from pathlib import Path
from types import TracebackType

from hf_megatron.errors import DestinationError


def check_overlap(destination: Path, source: Path) -> None:
    """Raise DestinationError if one of the two directories is the other one or lies in it."""
    destination, source = destination.resolve(), source.resolve()
    if destination == source or destination in source.parents or source in destination.parents:
        raise DestinationError(
            f"The destination {destination} and the source {source} overlap, which could destroy the source; choose a "
            "destination outside of it."
        )


def check_destination(destination: Path, *, overwrite: bool) -> Path:
    """Refuse a destination that must not be written; writes nothing.

    Returns:
        The destination with symbolic links resolved.

    Raises:
        DestinationError: It exists and ``overwrite`` was not asked for, or replacing it would delete more than a
            checkpoint.
    """
    destination = destination.resolve()
    if not destination.exists():
        return destination
    if not overwrite:
        raise _exists(destination)
    if not destination.is_dir():
        raise DestinationError(f"The destination {destination} is not a directory; remove it first.")
    kept = [path.name for path in destination.iterdir() if path.is_dir() and not _is_release(path)]
    if kept:
        raise DestinationError(
            f"The destination {destination} holds directories ({', '.join(sorted(kept)[:5])}), which no checkpoint "
            "written here does, and will not be overwritten. Remove it yourself if nothing in it is needed."
        )
    return destination


class Staging:
    """The hidden directory in which a destination comes to be. Leaving the context without ``publish`` removes it.

    Attributes:
        directory: Where to write.
    """

    def __init__(self, destination: Path, num_bytes: int, *, overwrite: bool) -> None:
        """Prepare to write.

        Args:
            destination: As ``check_destination`` returned it.
            num_bytes: What will be written, at most; refused beforehand if there is less space.
            overwrite: Whether to replace what is there when ``publish`` is called.
        """
        self._destination = destination
        self._overwrite = overwrite
        self._num_bytes = num_bytes
        self._old = destination.with_name(f".{destination.name}.old-{os.getpid()}")
        self._new_parents: list[Path] = []
        self._lock: int | None = None
        self.directory = destination.with_name(f".{destination.name}.tmp-{os.getpid()}")

    def __enter__(self) -> Staging:
        """Clear away what killed processes left, check the space, and create the directory.

        Raises:
            DestinationError: There is too little space, another process is writing the same destination, or it exists
                and is not to be replaced.
        """
        parent = self._destination.parent
        self._new_parents = [path for path in (parent, *parent.parents) if not path.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        try:
            self._recover()
            if self._destination.exists() and not self._overwrite:
                raise _exists(self._destination)
            free = shutil.disk_usage(parent).free
            if free < self._num_bytes:
                raise DestinationError(
                    f"{parent} has {free:,} bytes of free space, {self._num_bytes:,} are needed; nothing was written."
                )
            self.directory.mkdir()
            self._lock = _lock(self.directory)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def publish(self) -> None:
        """Put the directory in the destination's place. What was there before is removed afterwards.

        Raises:
            DestinationError: The destination came to be in the meantime.
        """
        for directory in (self.directory, *(path for path in self.directory.rglob("*") if path.is_dir())):
            _sync(directory)
        if self._destination.exists() and not self._overwrite:
            raise _exists(self._destination)
        try:
            if self._destination.exists():
                self._destination.rename(self._old)
            self.directory.rename(self._destination)
        except BaseException:
            if self._old.exists() and not self._destination.exists():
                self._old.rename(self._destination)
            raise
        _sync(self._destination.parent)
        self._new_parents.clear()
        shutil.rmtree(self._old, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the directory, if it was not published, and the parents that were created for it."""
        if self._lock is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._lock)
            self._lock = None
        for parent in self._new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def _recover(self) -> None:
        """Remove, or put back, what processes left that were killed while they wrote to the same destination."""
        parent, name = self._destination.parent, escape(self._destination.name)
        for path in parent.glob(f".{name}.tmp-*"):
            lock = _lock(path)
            if lock is None:
                raise DestinationError(f"Another process is writing {self._destination} (in {path}).")
            shutil.rmtree(path)
            os.close(lock)
        for path in parent.glob(f".{name}.old-*"):
            if self._destination.exists():
                shutil.rmtree(path)
            else:
                # Killed between the two renames of publish.
                path.rename(self._destination)


def _is_release(directory: Path) -> bool:
    """Whether this is the directory of a megatron-lm checkpoint, the only one in what is written here."""
    is_named = directory.name == "release" and directory.with_name("latest_checkpointed_iteration.txt").is_file()
    return is_named and all(path.name.startswith("mp_rank_") for path in directory.iterdir())


def _exists(destination: Path) -> DestinationError:
    return DestinationError(f"The destination {destination} exists; choose another, or overwrite it (--overwrite).")


def _lock(directory: Path) -> int | None:
    """An open descriptor that holds the directory's lock until it is closed or the process ends; None if it is held."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(directory: Path) -> None:
    """Have the kernel write the directory's entries to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
