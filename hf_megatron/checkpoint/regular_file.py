"""Open files, and nothing else that a path may lead to."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from hf_megatron.errors import CheckpointFormatError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes. CheckpointFormatError, at once, for pipes, sockets, devices, directories.

    To open a pipe would wait for whoever writes into it, and to open a device may do something.
    """
    _require_regular(path, path.stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)  # what was looked at may have been replaced
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise CheckpointFormatError(f"{path} is {kind}, not a file.")
