"""Who is writing a directory: a file in it that marks it as this package's, and is locked while its writer lives.

Only directories with this mark are ever cleaned up or taken over. On one machine the lock tells whether the writer
lives. Network file systems may not hand locks to other machines, so the writer also touches the file every few
seconds, and what another machine has marked counts as abandoned once that has stopped for two minutes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_megatron.errors import DestinationError

MARK = "hf_megatron_writer.json"
_BEAT_SECONDS, _ABANDONED_SECONDS = 15, 120


class WriteLock:
    """A marked directory that this process holds. Use :func:`lock_directory`."""

    def __init__(self, directory: Path, descriptor: int) -> None:
        self.directory, self._descriptor = directory, descriptor
        owner = {"written_by": "hf_megatron", "host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}
        data = (json.dumps(owner) + "\n").encode()
        # In this order, a directory can be taken over on a full disk: the file has its block already.
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
        self._owner = owner
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def is_held(self) -> bool:
        """Whether nobody has taken the directory over."""
        return _is_at(self._descriptor, self.directory / MARK) and _owner(self._descriptor) == self._owner

    def release(self) -> None:
        """Let others have the directory, if it is still there."""
        if not self._released.is_set():
            self._released.set()
            self._heart.join()  # or it could touch another file that is given the same descriptor
            os.close(self._descriptor)

    def remove(self) -> None:
        """Delete the directory, the mark last, so that what a killed process leaves is marked."""
        clear(self.directory)
        (self.directory / MARK).unlink(missing_ok=True)
        _remove_empty(self.directory)
        self.release()

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._descriptor)


def lock_directory(directory: Path) -> WriteLock:
    """Create a directory, or take over one with the mark whose writer is gone, with what is in it.

    Raises:
        DestinationError: Another process is writing it, or it is not marked.
        OSError: It cannot be created or marked; then a new one is not left behind.
    """
    while True:
        with suppress(FileExistsError):
            directory.mkdir()
        mark = directory / MARK
        if not mark.exists() and any(directory.iterdir()):
            raise DestinationError(
                f"{directory} is in the way, and has no {MARK} in it: it was not made by hf_megatron, or by an earlier "
                "version. Move it elsewhere, or remove it if nothing in it is needed."
            )
        try:
            descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # whose writer has just finished
            continue
        except OSError:
            _remove_empty(directory)
            raise
        try:
            is_locked = _lock(descriptor, directory)
            if not _is_at(descriptor, mark):
                os.close(descriptor)
                continue
            _require_abandoned(descriptor, directory, is_locked=is_locked)
            return _marked(directory, descriptor)
        except BaseException:
            os.close(descriptor)
            raise


def _marked(directory: Path, descriptor: int) -> WriteLock:
    try:
        return WriteLock(directory, descriptor)
    except OSError:
        if [entry.name for entry in directory.iterdir()] == [MARK]:
            (directory / MARK).unlink()
            _remove_empty(directory)
        raise


def _remove_empty(directory: Path) -> None:
    with suppress(OSError):  # of one that is not empty
        directory.rmdir()


def clear(directory: Path, *, kept: str = MARK) -> None:
    """Delete what is in a directory, except for one file: the mark, unless another is named."""
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != kept:
            entry.unlink()


def _lock(descriptor: int, directory: Path) -> bool:
    """Lock the mark; False if the file system has no locks, DestinationError if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DestinationError(f"Another process is writing in {directory}: {_described(descriptor)}.") from None
    except OSError:
        return False
    return True


def _require_abandoned(descriptor: int, directory: Path, *, is_locked: bool) -> None:
    owner = _owner(descriptor)
    if not owner or (is_locked and owner.get("host") == socket.gethostname()):
        return
    seconds = time.time() - os.fstat(descriptor).st_mtime
    if seconds < _ABANDONED_SECONDS:
        raise DestinationError(
            f"Another process is writing in {directory}: {_described(descriptor)}. Its last sign of life is "
            f"{seconds:.0f} seconds old. If it is gone, wait until it is {_ABANDONED_SECONDS}, or remove {directory}."
        )


def _owner(descriptor: int) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return owner if isinstance(owner, dict) else {}
    return {}


def _described(descriptor: int) -> str:
    owner = _owner(descriptor)
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
