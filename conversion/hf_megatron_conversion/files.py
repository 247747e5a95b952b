"""Files of a destination, whose sizes are known before they are written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

from hf_megatron.checkpoint import itemsize
from hf_megatron.checkpoint.file_identity import FileIdentity, open_unchanged
from hf_megatron.errors import CheckpointIncompleteError, DestinationError
from hf_megatron.partition import Box
from hf_megatron_conversion.output import Output
from hf_megatron_conversion.tensors import SLICE_BYTES, Buffer, Readable, slices_of_bytes

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

    @property
    def mode(self) -> int | None:
        """Its permissions, of which the umask may take some away; None for those of the source's weights."""

    def write(self, output: Output) -> None:
        """Write it."""


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


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How files are written.

    Attributes:
        threads: How many at a time.
        slice_bytes: How much of each is held in memory.
        weights_mode: Permissions of files made from weights.
    """

    threads: int = 1
    slice_bytes: int = SLICE_BYTES
    weights_mode: int = 0o666


def write_files(
    files: Sequence[OutputFile],
    directory: Path,
    progress: Progress,
    how: Writing,
    *,
    beside: Sequence[Callable[[threading.Event], None]] = (),
    done: Callable[[str, str], None] = lambda path, digest: None,
) -> dict[str, str]:
    """Write files into a directory, several at a time, those of known content at the end.

    Args:
        files: The files.
        directory: Where to.
        progress: Told how far it is.
        how: How many at a time, and in how much memory.
        beside: What else is to be done meanwhile; the event says that it is in vain.
        done: Told the path and the SHA-256 of each file that is complete.

    Returns:
        SHA-256 of each file, by path.

    Raises:
        DestinationError: The disk is full.
    """
    progress.begin("Writing", sum(file.nbytes for file in files))
    digests: dict[str, str] = {}
    stop = threading.Event()
    buffers = threading.local()

    def write(file: OutputFile) -> None:
        if not hasattr(buffers, "own"):
            buffers.own = Buffer(how.slice_bytes)
        mode = how.weights_mode if file.mode is None else file.mode
        digests[file.path] = _write(file, directory / file.path, progress, mode, buffers.own, stop)
        done(file.path, digests[file.path])

    large = [file for file in files if not isinstance(file, TextFile)]
    tasks = [partial(write, file) for file in large] + [partial(action, stop) for action in beside]
    with ThreadPoolExecutor(how.threads) as pool:
        try:
            for future in as_completed([pool.submit(task) for task in tasks]):
                future.result()
        except BaseException as error:
            stop.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                num_bytes = sum(file.nbytes for file in files)
                raise DestinationError(
                    f"There is no space left to write {error.filename or directory} ({error.strerror}); {num_bytes:,} "
                    "bytes are needed in all."
                ) from error
            raise
    for file in files:
        if isinstance(file, TextFile):
            write(file)
    return digests


def _write(file: OutputFile, path: Path, progress: Progress, mode: int, buffer: Buffer, stop: threading.Event) -> str:
    """Write a file, and return its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    output = Output(path, mode, progress.advance, buffer, stop)
    try:
        file.write(output)
        size, digest = output.close()
    except BaseException as error:
        output.abandon()
        if isinstance(error, OSError) and error.errno in _FULL:
            error.filename = file.path
        raise
    assert size == file.nbytes, f"{file.path}: {file.nbytes} bytes were planned, {size} written"
    return digest


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
    alignment: int = 8  # bytes, of the first tensor; the reference implementation's
    mode: None = None

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
        header += b" " * (-(8 + len(header)) % self.alignment)  # so that the tensors can be mapped
        return len(header).to_bytes(8, "little") + header

    @property
    def nbytes(self) -> int:
        return len(self._header) + sum(part.nbytes for part in self.parts)

    def write(self, output: Output) -> None:
        output.write(self._header)
        for part in self._ordered:
            for data in slices_of_bytes(part.tensor, part.box, output.buffer):
                output.write(data)


@dataclass(frozen=True, slots=True)
class TextFile:
    """A small file whose content is known beforehand, if need be by what ``source`` holds."""

    path: str
    data: bytes
    mode: int = 0o666
    source: Path | None = None

    @classmethod
    def json(cls, path: str, content: object) -> TextFile:
        """A JSON file as transformers writes them."""
        return cls(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def write(self, output: Output) -> None:
        output.write(self.data)


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """A file taken over as it is, its permissions included.

    Where the file system can share blocks between files until one of them changes (Btrfs, XFS), the kernel does that.
    With a hard link, whoever saves into the destination afterwards would overwrite the source.
    """

    path: str
    source: Path
    identity: FileIdentity
    mode: int

    @classmethod
    def of(cls, source: Path) -> CopiedFile:
        """A copy under the same name."""
        return cls(source.name, source, FileIdentity.of(source), source.stat().st_mode & 0o666)

    @property
    def nbytes(self) -> int:
        return self.identity.size

    def write(self, output: Output) -> None:
        with open_unchanged(self.source, self.identity) as original:
            copy = output.rewritten()
            position = 0
            while position < self.nbytes:
                try:
                    size = min(self.nbytes - position, _COPY_BYTES)
                    copied = os.copy_file_range(original.fileno(), copy.fileno(), size, offset_src=position)
                except (AttributeError, OSError) as error:
                    if position or getattr(error, "errno", None) not in _CANNOT_COPY:
                        raise
                    shutil.copyfileobj(original, copy)
                    copied = self.nbytes
                if copied == 0:
                    raise CheckpointIncompleteError(f"{self.source} became shorter while it was copied.")
                position += copied
                output.advance(copied)
