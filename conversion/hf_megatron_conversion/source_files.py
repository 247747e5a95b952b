"""The files that a conversion reads: that they stay what they are, lie where they say, and have the right checksums."""

from __future__ import annotations

import hashlib
import logging
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from hf_megatron.checkpoint.file_identity import FileIdentity, open_unchanged, require_unchanged
from hf_megatron.checkpoint.section import Section
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError
from hf_megatron_conversion.output import StoppedError
from hf_megatron_conversion.sha256sums import SHA256SUMS, read_sums

_logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**20
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ARCHIVES = (".pt", ".bin")

Archives = Mapping[Path, Sequence[tuple[int, int]]]
"""Where archives lie in larger files: first byte and length."""


def is_inside(directory: Path, path: Path) -> bool:
    """Whether a path in a directory leads to a place in it, or to the blobs of the Hub cache that the directory is of.

    A link may lead anywhere, and what is behind it would be copied, and perhaps uploaded.
    """
    root, target = directory.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return target.is_relative_to(root) or target.is_relative_to(blobs)


def hub_commit(directory: Path) -> str | None:
    """The commit that a directory of the Hub's cache holds; None for other directories."""
    directory = directory.resolve()
    is_snapshot = directory.parent.name == "snapshots" and _COMMIT.fullmatch(directory.name)
    return directory.name if is_snapshot else None


def identities(directory: Path) -> dict[Path, FileIdentity]:
    """Those of all files in a directory as it is now."""
    return {path: FileIdentity.of(path) for path in directory.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class SourceFiles:
    """The files that are read, as they were before anything was."""

    directory: Path
    files: Mapping[Path, FileIdentity]
    archives: Archives

    @classmethod
    def of(
        cls,
        directory: Path,
        before: Mapping[Path, FileIdentity],
        paths: Iterable[Path],
        archives: Archives = MappingProxyType({}),
    ) -> SourceFiles:
        """Those of ``paths`` that were there; ``archives`` lie within some of them.

        CheckpointFormatError if a link leads out of the directory that it lies in.
        """
        files = {path: before[path] if path in before else FileIdentity.of(path) for path in paths if path.is_file()}
        for path in files:
            if not is_inside(directory if path.is_relative_to(directory) else path.parent, path):
                raise CheckpointFormatError(
                    f"{path} is a link to {path.resolve()}, which is not in that directory. If it belongs to the "
                    "checkpoint, put the file itself there."
                )
        return cls(directory, files, archives)

    def name(self, path: Path) -> str:
        """What to call a file: its path in the directory, or all of it for one from elsewhere."""
        return path.relative_to(self.directory).as_posix() if path.is_relative_to(self.directory) else str(path)

    def require_unchanged(self) -> None:
        """Raise CheckpointIncompleteError if one is no longer the file that was read."""
        for path, identity in self.files.items():
            if not path.is_file():
                raise CheckpointIncompleteError(f"{path} was removed while it was read.")
            require_unchanged(path, identity, FileIdentity.of(path))

    def digest(self, path: Path, stop: threading.Event) -> str:
        """SHA-256 of one; damage that its own checksums show, or the directory's, is a CheckpointIncompleteError."""
        with open_unchanged(path, self.files[path]) as file:
            is_archive = path in self.archives or (path.suffix in _ARCHIVES and zipfile.is_zipfile(path))
            crcs = _Crcs(path, self.archives.get(path)) if is_archive else None
            sha256 = hashlib.sha256()
            while chunk := file.read(_CHUNK_BYTES):
                if stop.is_set():
                    raise StoppedError
                sha256.update(chunk)
                if crcs is not None:
                    crcs.update(chunk)
        return sha256.hexdigest()

    def require_listed(self, digests: Mapping[Path, str]) -> None:
        """See that files are those of the directory's SHA256SUMS, if it has one; else CheckpointIncompleteError."""
        for path, reason in _unlisted(self.directory, digests).items():
            raise CheckpointIncompleteError(f"{path} {reason}. Fetch or convert it again.")


def damaged(directory: Path, files: Sequence[Path], archives: Archives) -> dict[Path, str]:
    """What is wrong with weight files by the directory's SHA256SUMS, in words; ``archives`` lie within some of them.

    CheckpointIncompleteError for those that are damaged by checksums of their own.
    """
    if not read_sums(directory) and not archives and not any(path.suffix in _ARCHIVES for path in files):
        return {}
    sources = SourceFiles.of(directory, {}, files, archives)
    return _unlisted(directory, {path: sources.digest(path, threading.Event()) for path in sources.files})


def _unlisted(directory: Path, digests: Mapping[Path, str]) -> dict[Path, str]:
    """Weights that are not those that SHA256SUMS names; archives, which have checksums of their own, may be changed."""
    found = {}
    for name, expected in read_sums(directory).items():
        path = directory / name
        if path.suffix in (*_ARCHIVES, ".distcp") and digests.get(path, expected) != expected:
            _logger.warning("%s was changed after %s was written.", path, SHA256SUMS)
        elif path.suffix == ".safetensors" and digests.get(path, expected) != expected:
            found[path] = (
                f"has other bytes than {SHA256SUMS} says: it is damaged, or was changed (if so, delete {SHA256SUMS})"
            )
    return found


class _Crcs:
    """Checks the CRC-32 of each entry of a zip archive, whose bytes are handed over in the order of the file.

    ``sections`` are where in the file several archives lie, if it is not one itself.
    """

    def __init__(self, path: Path, sections: Sequence[tuple[int, int]] | None = None) -> None:
        self._path, self._position, self._next, self._crc = path, 0, 0, 0
        self._entries: list[tuple[int, int, int, str]] = []
        with path.open("rb") as file:
            for first, length in [(0, path.stat().st_size)] if sections is None else sections:
                with zipfile.ZipFile(Section(file, first, length)) as archive:
                    self._entries += (
                        (_data_start(file, first + info.header_offset), info.file_size, info.CRC, info.filename)
                        for info in archive.infolist()
                        if info.file_size and info.compress_type == zipfile.ZIP_STORED
                    )
        self._entries.sort()
        if self._entries and not any(crc for _, _, crc, _ in self._entries):
            raise CheckpointFormatError(
                f"{path} has no checksums: it was saved after torch.serialization.set_crc32_options(False), and damage "
                "to it cannot be noticed. If you trust it, save it again with set_crc32_options(True)."
            )
        for (start, size, _, name), (other, _, _, other_name) in pairwise(self._entries):
            if start + size > other:
                raise CheckpointFormatError(f"{path}: {name} and {other_name} overlap; torch.save writes no such file.")

    def update(self, chunk: bytes) -> None:
        """Take the next bytes; CheckpointIncompleteError if an entry ends in them and is not what was written."""
        begin, end = self._position, self._position + len(chunk)
        while self._next < len(self._entries):
            start, size, crc, name = self._entries[self._next]
            if start >= end:
                break
            part = memoryview(chunk)[max(start - begin, 0) : start + size - begin]
            self._crc = zlib.crc32(part, self._crc)
            if start + size > end:
                break
            if self._crc != crc:
                raise CheckpointIncompleteError(
                    f"{self._path} is damaged: the bytes of {name} have the CRC-32 {self._crc:08x}, and {crc:08x} was "
                    "written. Fetch the file again."
                )
            self._next, self._crc = self._next + 1, 0
        self._position = end


def _data_start(file: BinaryIO, header: int) -> int:
    """Offset of an entry's data, after its local header."""
    file.seek(header)
    *_, name_size, extra_size = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return header + _LOCAL_HEADER.size + int(name_size) + int(extra_size)
