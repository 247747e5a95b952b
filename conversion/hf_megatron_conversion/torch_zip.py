"""Files of ``torch.save``, written a slice of one tensor at a time.

The layout is torch's own: a zip archive without compression, ``data.pkl`` with the object, and one entry per tensor
whose data starts at a multiple of 64 bytes, so that it can be mapped. All sizes are known beforehand.

Source: PKWARE's APPNOTE.TXT 6.3; ``torch.serialization._save`` and ``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from hf_megatron.partition import Box
from hf_megatron_conversion.output import Output
from hf_megatron_conversion.tensors import Buffer, Readable, Reshaped, num_bytes, slices_of_bytes
from hf_megatron_conversion.torch_pickle import pickled

_ALIGNMENT = 64
# Bytes of a header before an entry (without its name, with its size in 64 bits), of an entry in the directory (without
# its name), of the end of the directory, and what that has in addition where 32 bits do not do.
_HEADER, _RECORD, _END, _LONG_END = 30 + 20, 46, 22, 56 + 20


@dataclass(frozen=True)
class _Entry:
    """A file in the archive: where its header starts, and how many bytes fill that up to align the data."""

    name: str
    data: bytes | Readable | Reshaped
    position: int

    @property
    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else num_bytes(self.data)

    @property
    def padding(self) -> bytes:
        """An extra field, of four bytes at least."""
        size = -(self.position + _HEADER + len(self.name) + 4) % _ALIGNMENT
        return struct.pack("<2sH", b"FB", size) + b"Z" * size

    @property
    def stop(self) -> int:
        return self.position + _HEADER + len(self.name) + len(self.padding) + self.size

    @property
    def record_size(self) -> int:
        """Bytes of its entry in the directory."""
        longs = 2 * (self.size > zipfile.ZIP64_LIMIT) + (self.position > zipfile.ZIP64_LIMIT)
        return _RECORD + len(self.name) + (4 + 8 * longs if longs else 0)

    def chunks(self, buffer: Buffer) -> Iterator[Any]:
        if isinstance(self.data, bytes):
            return iter([self.data])
        tensor = self.data.tensor if isinstance(self.data, Reshaped) else self.data
        return slices_of_bytes(tensor, Box.whole(tensor.shape), buffer)


@dataclass(frozen=True)
class Archive:
    """What one ``torch.save`` writes, all of whose entries are in a directory ``name``."""

    name: str
    content: Any  # a tensor (a Readable), a plain value, or dictionaries, lists and tuples of them

    @cached_property
    def nbytes(self) -> int:
        stop, directory = self._entries[-1].stop, sum(entry.record_size for entry in self._entries)
        is_long = max(stop, directory) > zipfile.ZIP64_LIMIT or len(self._entries) > zipfile.ZIP_FILECOUNT_LIMIT
        return stop + directory + _END + (_LONG_END if is_long else 0)

    def write(self, output: Output) -> None:
        """Append it to a file."""
        with zipfile.ZipFile(_Appended(output.rewritten()), "w") as archive:
            for entry in self._entries:
                info = zipfile.ZipInfo(entry.name)  # of 1980, so that equal content gives equal files
                info.extra = entry.padding
                with archive.open(info, "w", force_zip64=True) as target:
                    for chunk in entry.chunks(output.buffer):
                        target.write(chunk)
                        output.advance(len(chunk))
                info.extra = b""  # the directory, which is written at the end, is without the padding

    @cached_property
    def _entries(self) -> list[_Entry]:
        data, tensors = pickled(self.content)
        content: dict[str, bytes | Readable | Reshaped] = {"data.pkl": data, "byteorder": b"little"}
        content |= {f"data/{key}": tensor for key, tensor in enumerate(tensors)}
        content["version"] = b"3\n"
        entries: list[_Entry] = []
        for name, part in content.items():
            entries.append(_Entry(f"{self.name}/{name}", part, entries[-1].stop if entries else 0))
        return entries


class _Appended:
    """What follows in a file, as a file of its own: positions in an archive are counted from its start."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._start = stream, stream.tell()
        self.write, self.flush, self.close = stream.write, stream.flush, stream.close

    def tell(self) -> int:
        return self._stream.tell() - self._start

    def seek(self, position: int) -> int:
        return self._stream.seek(self._start + position) - self._start


@dataclass(frozen=True)
class ArchivesFile:
    """A file of archives, one after the other."""

    path: str  # relative to the destination
    archives: Sequence[Archive]
    mode: None = None

    @property
    def nbytes(self) -> int:
        return sum(archive.nbytes for archive in self.archives)

    def write(self, output: Output) -> None:
        for archive in self.archives:
            archive.write(output)


def torch_file(path: str, content: Mapping[str, Any]) -> ArchivesFile:
    """A file that ``torch.load`` reads."""
    return ArchivesFile(path, [Archive(PurePosixPath(path).stem, content)])
