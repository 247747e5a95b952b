"""A file that is being written: what goes into it is counted and hashed on its way."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from hf_megatron_conversion.tensors import Buffer


class StoppedError(Exception):
    """Another file could not be written, so that this one need not be."""


class Output:
    """Where an ``OutputFile`` writes itself to.

    Args:
        path: The file, which must not exist.
        mode: Its permissions, of which the process's umask may take some away.
        advance: Told how many bytes were written since the last call; from several threads.
        buffer: Memory for slices of tensors.
        stop: Set when nothing more is to be written.
    """

    def __init__(
        self, path: Path, mode: int, advance: Callable[[int], None], buffer: Buffer, stop: threading.Event
    ) -> None:
        self.path, self.buffer = path, buffer
        self._advance, self._stop = advance, stop
        self._hash, self._is_hashed = hashlib.sha256(), True
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        self._stream = os.fdopen(descriptor, "w+b")

    def write(self, data: bytes | memoryview) -> None:
        """Append to the file."""
        self._stream.write(data)
        self._hash.update(data)
        self.advance(len(data))

    def advance(self, num_bytes: int) -> None:
        """Report bytes that were not written with ``write``."""
        if self._stop.is_set():
            raise StoppedError
        self._advance(num_bytes)

    def rewritten(self) -> BinaryIO:
        """The file itself, for those who write to it in another order; it is read again for its checksum."""
        self._is_hashed = False
        return self._stream

    def close(self) -> tuple[int, str]:
        """Close the file: its size, and its SHA-256 in hexadecimal digits."""
        with self._stream:
            self._stream.flush()
            size = os.fstat(self._stream.fileno()).st_size
            if not self._is_hashed:
                self._stream.seek(0)
                self._hash = hashlib.file_digest(self._stream, "sha256")
        return size, self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the file after a failure."""
        with suppress(OSError):  # which is what it may have failed with
            self._stream.close()
