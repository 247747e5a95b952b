"""Files of a destination: their size is known before they are written, and they are written as one stream."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

from hf_megatron.checkpoint import itemsize
from hf_megatron.partition import Box
from hf_megatron_conversion.tensors import Readable, bounded, raw_bytes

__all__ = ["CopiedFile", "OutputFile", "Part", "SafetensorsFile", "TextFile"]

_COPY_BYTES = 256 * 2**20


class OutputFile(Protocol):
    """A file to be written."""

    @property
    def path(self) -> str:
        """Where, relative to the destination."""

    @property
    def nbytes(self) -> int:
        """Its exact size."""

    def write(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        """Write it, front to back, calling ``advance`` with the bytes written since the last call."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a file: the box of a full tensor that it holds, and its name in the file."""

    name: str
    tensor: Readable
    box: Box

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return self.box.numel * itemsize(self.tensor.dtype)


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file, laid out as the reference implementation does: widest dtype first, then by name.

    Holds at most one bounded slice of one tensor in memory while it is written.
    """

    path: str
    parts: Sequence[Part]
    metadata: Mapping[str, str]

    @cached_property
    def _ordered(self) -> list[Part]:
        return sorted(self.parts, key=lambda part: (-itemsize(part.tensor.dtype), part.name))

    @cached_property
    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)}
        position = 0
        for part in self._ordered:
            entries[part.name] = {
                "dtype": part.tensor.dtype,
                "shape": list(part.box.shape),
                "data_offsets": [position, position + part.nbytes],
            }
            position += part.nbytes
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        # The tensors start at a multiple of eight bytes, so that they can be mapped.
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header

    @property
    def nbytes(self) -> int:
        """Its exact size."""
        return len(self._header) + sum(part.nbytes for part in self.parts)

    def write(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        """Write the header, then every tensor a bounded slice at a time."""
        stream.write(self._header)
        advance(len(self._header))
        for part in self._ordered:
            for box in bounded(part.box, part.tensor.dtype):
                data = raw_bytes(part.tensor.read(box)).numpy()
                stream.write(data.data)
                advance(data.nbytes)


@dataclass(frozen=True, slots=True)
class TextFile:
    """A small file whose content is known beforehand."""

    path: str
    data: bytes

    @classmethod
    def json(cls, path: str, content: object) -> TextFile:
        """A JSON file as transformers writes them."""
        return cls(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    @property
    def nbytes(self) -> int:
        """Its exact size."""
        return len(self.data)

    def write(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        """Write it."""
        stream.write(self.data)
        advance(len(self.data))


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """A file taken over as it is.

    Where the file system can share blocks between files until one of them changes (Btrfs, XFS), the kernel does that
    instead of copying. Hard links would be as cheap everywhere, but whoever saves into the destination afterwards would
    then overwrite the source.
    """

    path: str
    source: Path
    nbytes: int

    @classmethod
    def of(cls, source: Path) -> CopiedFile:
        """A copy under the same name."""
        return cls(source.name, source, source.stat().st_size)

    def write(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        """Copy it, inside the kernel where that is possible."""
        with self.source.open("rb") as original:
            try:
                while copied := os.copy_file_range(original.fileno(), stream.fileno(), _COPY_BYTES):
                    advance(copied)
            except (AttributeError, OSError):
                # Not on this system, or not between these two file systems; a full disk fails here again.
                original.seek(0)
                stream.seek(0)
                stream.truncate()
                shutil.copyfileobj(original, stream)
                advance(self.nbytes)
