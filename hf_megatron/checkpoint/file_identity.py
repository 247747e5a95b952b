"""Notice that a file is no longer the one that was looked at first."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

from hf_megatron.errors import CheckpointIncompleteError


class FileIdentity(NamedTuple):
    """What changes when a file is replaced or written to."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> FileIdentity:
        """That of a path, links followed, or of an open descriptor."""
        status = os.fstat(file) if isinstance(file, int) else file.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def require_unchanged(path: Path, before: FileIdentity, now: FileIdentity) -> None:
    """Raise CheckpointIncompleteError if the two are not the same."""
    if now != before:
        what = "became shorter" if now.size < before.size else "was changed or replaced"
        raise CheckpointIncompleteError(
            f"{path} {what} while it was read: what was read before and after does not belong together. Start again "
            "when nobody writes to it."
        )


def open_unchanged(path: Path, identity: FileIdentity | None) -> io.FileIO:
    """Open a file for reading, unbuffered; CheckpointIncompleteError if it is another than when it was looked at."""
    try:
        file = io.FileIO(path)
    except FileNotFoundError:
        raise CheckpointIncompleteError(f"{path} was removed while it was read.") from None
    if identity is not None:
        try:
            require_unchanged(path, identity, FileIdentity.of(file.fileno()))
        except BaseException:
            file.close()
            raise
    return file
