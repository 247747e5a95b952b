"""A part of a file that is read as a file of its own."""

from __future__ import annotations

import io
import os
from typing import BinaryIO


class Section(io.RawIOBase):
    """The ``length`` bytes from ``start`` on of an open file; positions count from ``start``."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, which may lie behind the end."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, memory: memoryview) -> int:  # type: ignore[override]
        """Fill ``memory`` from the position on, as far as the section goes."""
        size = max(min(len(memory), self._length - self._position), 0)
        self._file.seek(self._start + self._position)
        data = self._file.read(size)
        memory[: len(data)] = data
        self._position += len(data)
        return len(data)


def size_of(file: BinaryIO | Section) -> int:
    """Bytes of an open file, or section of one; it is left at its end."""
    return file.seek(0, os.SEEK_END)
