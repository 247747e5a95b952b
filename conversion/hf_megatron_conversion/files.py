"""Files of a destination, whose sizes are known before they are written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

from hf_megatron.checkpoint import LazyTensor, itemsize
from hf_megatron.errors import CheckpointIncompleteError, DestinationError
from hf_megatron.partition import Box
from hf_megatron_conversion.tensors import Buffer, Readable, slices_of_bytes

_COPY_BYTES = 256 * 2**20
# What copy_file_range says where it does not work; None is for systems that do not have it.
_CANNOT_COPY = (None, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputFile(Protocol):
    """A file to be written."""

    @property
    def path(self) -> str:
        """Where, relative to the destination."""

    @property
    def nbytes(self) -> int:
        """Its exact size."""

    def write(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        """Write it, calling ``advance`` with the bytes written since the last call."""


class Progress(Protocol):
    """Receives the progress of one task after the other."""

    def begin(self, task: str, total_bytes: int) -> None:
        """A task starts that will handle this many bytes."""

    def advance(self, num_bytes: int) -> None:
        """The task has handled this many more bytes."""


class Silent:
    """Tells nobody."""

    def begin(self, task: str, total_bytes: int) -> None:
        """Ignored."""

    def advance(self, num_bytes: int) -> None:
        """Ignored."""


def write_files(files: Sequence[OutputFile], directory: Path, progress: Progress) -> None:
    """Write files into a directory, one after the other; DestinationError if the disk is full."""
    num_bytes = sum(file.nbytes for file in files)
    progress.begin("Writing", num_bytes)
    for file in files:
        try:
            _write(file, directory / file.path, progress)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise DestinationError(
                f"There is no space left to write {file.path} of {file.nbytes:,} bytes ({error.strerror}); "
                f"{num_bytes:,} bytes are needed in all. Nothing was left behind."
            ) from error


def _write(file: OutputFile, path: Path, progress: Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as stream:
        file.write(stream, progress.advance)
    size = path.stat().st_size
    assert size == file.nbytes, f"{file.path}: {file.nbytes} bytes were planned, {size} written"


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a file: the box of a full tensor that it holds, and its name in the file."""

    name: str
    tensor: Readable
    box: Box

    @property
    def nbytes(self) -> int:
        return self.box.numel * itemsize(self.tensor.dtype)


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file, laid out as the reference implementation does: widest dtype first, then by name."""

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
        header += b" " * (-len(header) % 8)  # so that the tensors can be mapped
        return len(header).to_bytes(8, "little") + header

    @property
    def nbytes(self) -> int:
        return len(self._header) + sum(part.nbytes for part in self.parts)

    def write(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        stream.write(self._header)
        advance(len(self._header))
        buffer = Buffer()
        for part in self._ordered:
            extent = part.tensor.extent(part.box) if isinstance(part.tensor, LazyTensor) else None
            if extent is not None and _copy_range(*extent, stream, advance):
                continue
            for data in slices_of_bytes(part.tensor, part.box, buffer):
                stream.write(data)
                advance(len(data))


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
        return len(self.data)

    def write(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        stream.write(self.data)
        advance(len(self.data))


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """A file taken over as it is.

    Where the file system can share blocks between files until one of them changes (Btrfs, XFS), the kernel does that.
    With a hard link, whoever saves into the destination afterwards would overwrite the source.
    """

    path: str
    source: Path
    nbytes: int

    @classmethod
    def of(cls, source: Path) -> CopiedFile:
        """A copy under the same name."""
        return cls(source.name, source, source.stat().st_size)

    def write(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        if not _copy_range(self.source, 0, self.nbytes, stream, advance):
            with self.source.open("rb") as original:
                shutil.copyfileobj(original, stream)
            advance(self.nbytes)


def _copy_range(source: Path, start: int, stop: int, stream: BinaryIO, advance: Callable[[int], None]) -> bool:
    """Have the kernel append bytes ``[start, stop)`` of a file; False if it cannot between these two file systems."""
    stream.flush()
    position = start
    with source.open("rb") as original:
        while position < stop:
            try:
                size = min(stop - position, _COPY_BYTES)
                copied = os.copy_file_range(original.fileno(), stream.fileno(), size, offset_src=position)
            except (AttributeError, OSError) as error:
                if position > start or getattr(error, "errno", None) not in _CANNOT_COPY:
                    raise
                return False
            if copied == 0:
                raise CheckpointIncompleteError(f"{source} became shorter while it was copied.")
            position += copied
            advance(copied)
    stream.seek(0, os.SEEK_END)  # what was written past its back has to be counted in
    return True
