"""Files of ``torch.save``, written as a stream: any tensor's bytes are made when their turn comes.

The layout is torch's own: a zip archive without compression, ``data.pkl`` with the object, and one entry per tensor
that starts at a multiple of 64 bytes. Lengths are known beforehand; checksums follow the data they are for.

Source: PKWARE's APPNOTE.TXT 6.3; ``torch.serialization._save`` and ``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from hf_megatron.checkpoint import itemsize
from hf_megatron.partition import Box
from hf_megatron_conversion.tensors import Buffer, Readable, slices_of_bytes

_ALIGNMENT = 64
_PICKLE_PROTOCOL = 2  # torch.save's
_LONG = 0xFFFFFFFF  # from here on a number needs 64 bits, and stands in an extra field; its own holds _ELSEWHERE
_ELSEWHERE = 0xFFFFFFFF
_FLAGS = 0x0808  # the checksum follows the data; names are UTF-8
_DATE = (0, 0x21)  # 1980-01-01, so that equal content gives equal files
_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}

Chunks = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class _Storage:
    key: str
    tensor: Readable


@dataclass(frozen=True)
class _Entry:
    """A file in the archive: its name, size, and the bytes in bounded chunks."""

    name: str
    size: int
    chunks: Chunks


@dataclass(frozen=True)
class TorchZipFile:
    """A file that ``torch.load`` reads.

    Attributes:
        path: Relative to the destination.
        content: What is saved: nested dictionaries, in which a ``Readable`` stands for a tensor, and anything else that
            can be pickled.
    """

    path: str
    content: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Its exact size."""
        return self._directory_start + len(self._directory)

    def write(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        """Write it front to back, with one bounded slice of one tensor in memory."""
        checksums = []
        for entry, header in zip(self._entries, self._headers, strict=True):
            stream.write(header)
            checksum = 0
            for chunk in entry.chunks():
                stream.write(chunk)
                checksum = zlib.crc32(chunk, checksum)
                advance(len(chunk))
            checksums.append(checksum)
            stream.write(_descriptor(entry.size, checksum))
        stream.write(self._central_directory(checksums))

    @cached_property
    def _entries(self) -> list[_Entry]:
        storages: list[_Storage] = []
        data = _pickled(self.content, storages)
        stem = PurePosixPath(self.path).stem
        small = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
        entries = [_Entry(f"{stem}/{name}", len(content), _chunk(content)) for name, content in small.items()]
        buffer = Buffer()
        tensors = [
            _Entry(f"{stem}/data/{storage.key}", _nbytes(storage.tensor), _tensor_chunks(storage.tensor, buffer))
            for storage in storages
        ]
        return [*entries[:2], *tensors, entries[2]]

    @cached_property
    def _headers(self) -> list[bytes]:
        """What stands before each entry's data."""
        headers, position = [], 0
        for entry in self._entries:
            header = _local_header(entry, position)
            headers.append(header)
            position += len(header) + entry.size + len(_descriptor(entry.size, 0))
        return headers

    @cached_property
    def _directory_start(self) -> int:
        descriptors = sum(len(_descriptor(entry.size, 0)) for entry in self._entries)
        return sum(map(len, self._headers)) + sum(entry.size for entry in self._entries) + descriptors

    @cached_property
    def _directory(self) -> bytes:
        return self._central_directory([0] * len(self._entries))

    def _central_directory(self, checksums: list[int]) -> bytes:
        result, position = b"", 0
        parts = []
        for entry, header, checksum in zip(self._entries, self._headers, checksums, strict=True):
            parts.append(_directory_record(entry, position, checksum))
            position += len(header) + entry.size + len(_descriptor(entry.size, 0))
        result = b"".join(parts)
        return result + _end(len(parts), len(result), position)


def _pickled(content: Mapping[str, Any], storages: list[_Storage]) -> bytes:
    """The object's pickle; ``storages`` is filled with its tensors, in order."""
    import torch

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, _Storage):
                return None
            storage_type = getattr(torch, _STORAGES[value.tensor.dtype])
            return "storage", storage_type, value.key, "cpu", prod(value.tensor.shape)

        def reducer_override(self, value: Any) -> Any:
            if not (hasattr(value, "read") and hasattr(value, "shape")):
                return NotImplemented
            storages.append(_Storage(str(len(storages)), value))
            strides = tuple(prod(value.shape[dim + 1 :]) for dim in range(len(value.shape)))
            hooks: OrderedDict[str, Any] = OrderedDict()
            return torch._utils._rebuild_tensor_v2, (storages[-1], 0, tuple(value.shape), strides, False, hooks)

    buffer = io.BytesIO()
    Pickler(buffer, _PICKLE_PROTOCOL).dump(content)
    return buffer.getvalue()


def _nbytes(tensor: Readable) -> int:
    return prod(tensor.shape) * itemsize(tensor.dtype)


def _chunk(content: bytes) -> Chunks:
    return lambda: iter([content])


def _tensor_chunks(tensor: Readable, buffer: Buffer) -> Chunks:
    return lambda: slices_of_bytes(tensor, Box.whole(tensor.shape), buffer)


def _short(number: int) -> int:
    return number if number < _LONG else _ELSEWHERE


def _local_header(entry: _Entry, position: int) -> bytes:
    """The header, padded so that the data behind it is aligned."""
    name = entry.name.encode()
    is_long = entry.size >= _LONG
    extra = struct.pack("<HHQQ", 1, 16, entry.size, entry.size) if is_long else b""
    # The padding is an extra field too, of four bytes at least.
    padding = -(position + 30 + len(name) + len(extra) + 4) % _ALIGNMENT
    extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    size = _short(entry.size)
    version = 45 if is_long else 20
    fields = (b"PK\x03\x04", version, _FLAGS, 0, *_DATE, 0, size, size, len(name), len(extra))
    return struct.pack("<4s5H3L2H", *fields) + name + extra


def _descriptor(size: int, checksum: int) -> bytes:
    """What stands behind an entry's data."""
    return struct.pack("<4sLQQ" if size >= _LONG else "<4sLLL", b"PK\x07\x08", checksum, size, size)


def _directory_record(entry: _Entry, position: int, checksum: int) -> bytes:
    name = entry.name.encode()
    long = [entry.size, entry.size] if entry.size >= _LONG else []
    long += [position] if position >= _LONG else []
    extra = struct.pack(f"<HH{len(long)}Q", 1, 8 * len(long), *long) if long else b""
    size, offset, version = _short(entry.size), _short(position), 45 if long else 20
    fields = (b"PK\x01\x02", version, version, _FLAGS, 0, *_DATE, checksum, size, size, len(name), len(extra))
    return struct.pack("<4s6H3L5H2L", *fields, 0, 0, 0, 0, offset) + name + extra


def _end(count: int, size: int, start: int) -> bytes:
    """The end of the directory, with the fields for large archives where they are needed."""
    result = b""
    if start >= _LONG or count >= 0xFFFF:
        fields = (b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
        result += struct.pack("<4sQ2H2L4Q", *fields)
        result += struct.pack("<4sLQL", b"PK\x06\x07", 0, start + size, 1)
    short = min(count, 0xFFFF)
    return result + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, short, short, size, _short(start), 0)
