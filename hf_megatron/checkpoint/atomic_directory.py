"""Atomic directory writes: the destination is either complete or absent, even if writing processes are killed.

The directory is written within a hidden one next to the destination, ``.NAME.incomplete``, and takes the destination's
place once all of it is on disk; what was there before is deleted at the end. Where a directory cannot be renamed (a
mount point, a lower layer of an overlay) the hidden one lies in the destination, and files are moved one by one. The
next write to the same destination cleans up what killed processes left, and touches nothing without their mark.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Self

from hf_megatron.checkpoint import renaming
from hf_megatron.checkpoint.renaming import move, sync
from hf_megatron.checkpoint.write_lock import MARK, WriteLock, clear, lock_directory
from hf_megatron.errors import DestinationError

_BLOCK_BYTES = 4096  # which a file system gives to a file as a whole


class AtomicDirectory:
    """Context manager that writes a directory atomically. Without ``publish``, leaving the context deletes it.

        with AtomicDirectory(destination) as directory:
            (directory.path / "file").write_text("...")
            directory.publish()

    Ranks that write one directory together each create an instance and call the same methods. If the destination is
    itself the directory that another instance writes, it is part of that one and is written directly.

    Args:
        destination: The directory to write; symbolic links are resolved.
        replace: Whether one that exists may be replaced.
        keep: Which entries of a replaced directory the new one has too, unless it has entries of the same name.
        resume: Whether to go on with what a killed process has left.
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
        resume: bool = False,
        is_first: bool = True,
        meet: Callable[[Exception | None], None] | None = None,
    ) -> None:
        self.destination = _resolved(Path(destination))
        self._replace, self._keep, self.resumes = replace, keep, resume
        self._is_first, self._meet = is_first, meet
        around = self.destination.parent
        self._is_part = around.name == _hidden(self.destination).name and (around / MARK).exists()
        self.container = around if self._is_part else _hidden(self.destination)
        self.is_to_remove = False
        """Whether leaving the context deletes the directory; a process that may go on later clears it."""
        self._lock: WriteLock | None = None
        self._new_parents: list[Path] = []
        self._check_destination()

    @property
    def path(self) -> Path:
        """Where to write."""
        return self.container / self.destination.name

    def __enter__(self) -> Self:
        """Clean up after killed processes and create the directory.

        DestinationError if it cannot be created, or is being written now.
        """
        try:
            self._on_first(self._create)
        except BaseException:
            self.__exit__()
            raise
        inside = _inside(self.destination)
        if not self._is_first and not self._is_part and inside.is_dir():
            self.container = inside
        self.is_to_remove = not self._is_part
        return self

    def require_space(self, num_bytes: int, num_files: int = 0) -> None:
        """Raise DestinationError if fewer bytes are free. A directory that will be replaced stays until the end."""
        needed = num_bytes + num_files * _BLOCK_BYTES
        if (free := shutil.disk_usage(self.path).free) < needed:
            beside = f" beside the {self.destination.name} that is there" if self.destination.exists() else ""
            raise DestinationError(
                f"{self.destination.parent} has {free:,} bytes of free space, {needed:,} are needed{beside}; nothing "
                "was written."
            )

    def failure(self, error: OSError) -> DestinationError:
        """What to raise in place of an error of the system's, which may name a file of the hidden directory."""
        place = f" ({error.filename})" if error.filename and str(self.container) not in str(error.filename) else ""
        return DestinationError(f"{self.destination} cannot be written: {error.strerror or error}{place}.")

    def publish(self, *, merge: bool = False) -> None:
        """Rename the directory to its destination; with ``merge``, move its files into an existing destination."""
        self._settle()  # every rank has written its part
        self._on_first(self._move_files if merge and self.destination.exists() else self._swap)
        self.is_to_remove = False

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            if self.is_to_remove and self._lock.is_held():
                renaming.undo_or_finish(self.path, self.destination)
                self._lock.remove()
            self._lock.release()
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

    def _create(self) -> None:
        try:
            self._create_locked()
        except OSError as error:
            raise self.failure(error) from error

    def _create_locked(self) -> None:
        parent = self.destination.parent
        self._new_parents = [path for path in (parent, *parent.parents) if not path.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked_container()
        self.container = self._lock.directory
        self.is_to_remove = True
        renaming.undo_or_finish(self.path, self.destination)
        self._check_destination()
        if not self.resumes or self.path.is_symlink():  # which would lead out of the directory
            clear(self.container)
        self.path.mkdir(exist_ok=True)

    def _locked_container(self) -> WriteLock:
        """The hidden directory: next to the destination, or in it if it cannot be renamed."""
        if not self.destination.exists():
            return lock_directory(self.container)
        if not os.path.ismount(self.destination):
            lock = lock_directory(self.container)
            try:
                if renaming.can_rename(self.destination, self.container):
                    return lock
            except BaseException:
                lock.remove()
                raise
            lock.remove()
        return lock_directory(_inside(self.destination))

    def _swap(self) -> None:
        assert self._lock is not None
        self._check_destination()
        is_inside = self.container.parent == self.destination
        if self.destination.exists() and not is_inside:
            for entry in self.destination.iterdir():
                if self._keep(entry) and not (self.path / entry.name).exists():
                    renaming.link_tree(entry, self.path / entry.name)
        sync(*self.path.rglob("*"), self.path, self.container)
        if not self._lock.is_held():
            raise DestinationError(f"Another process has taken over {self.container}; nothing was replaced.")
        if is_inside:
            renaming.replace_files(self.path, self.destination, self._keep)
        else:
            renaming.replace_directory(self.path, self.destination)
        self._end()

    def _end(self) -> None:
        """Flush the new names, and only then delete what is not needed any more."""
        assert self._lock is not None
        sync(self.container, self.destination, self.destination.parent, *(path.parent for path in self._new_parents))
        self._new_parents.clear()
        self._lock.remove()

    def _move_files(self) -> None:
        files = [path for path in self.path.rglob("*") if path.is_file()]
        sync(*files)
        for path in sorted(files):
            target = self.destination / path.relative_to(self.path)
            move(path, target)
            sync(target.parent)
        self._end()


def recover(destination: Path) -> bool:
    """Clean up or restore what killed processes left next to ``destination``; False if that is not possible now."""
    container = _hidden(destination)
    if (container / MARK).exists():
        try:
            lock = lock_directory(container)
        except DestinationError:
            return False
        renaming.undo_or_finish(container / destination.name, destination)
        lock.remove()
    return True


def remove(directory: Path) -> None:
    """Delete a directory so that a partly deleted one is never mistaken for a complete one: rename it first."""
    lock = lock_directory(_hidden(directory))
    directory.rename(lock.directory / directory.name)
    lock.remove()


def leftovers(destination: Path) -> list[Path]:
    """What killed processes left for the next write to clean up, or are writing now."""
    places = (_hidden(destination), _inside(destination))
    return [place for place in places if (place / MARK).exists()]


def directories_in(destination: Path) -> list[Path]:
    """The directories in a destination, but for what :func:`leftovers` finds; replacing it would delete them."""
    left = leftovers(destination)
    entries = sorted(destination.iterdir()) if destination.exists() else []
    return [path for path in entries if path.is_dir() and path not in left]


def _resolved(destination: Path) -> Path:
    """Its path without links; DestinationError for a loop of links, and for a root, which has no place beside it."""
    try:
        resolved = destination.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError until Python 3.13
        raise DestinationError(f"The destination {destination} is a link that leads back to itself.") from error
    if not resolved.name:
        raise DestinationError(f"The destination {resolved} is a whole file system; choose a directory in it.")
    return resolved


def _hidden(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.incomplete")


def _inside(destination: Path) -> Path:
    return destination / f".{destination.name}.incomplete"
