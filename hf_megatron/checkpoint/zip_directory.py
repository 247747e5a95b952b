"""Read the directory of a zip archive that torch.save has written: names, and where the data lies.

An archive can be made so that one reader finds other files in it than the next one: by two entries of one name, by a
directory that starts elsewhere than it says, by bytes before or behind the archive, by local headers that contradict
the directory. So only one form is read, which is that of torch.save and of ``zipfile``: the directory and its end stand
at the end of the file, where they say they do, and entries are stored without compression under unique plain names in
one folder.

Source: PKWARE's APPNOTE.TXT 6.3; ``miniz.c`` and ``caffe2/serialize/inline_container.cc`` of torch.
"""

from __future__ import annotations

import re
import stat
import struct
from dataclasses import dataclass
from typing import BinaryIO

from hf_megatron.checkpoint.budgets import MAX_ZIP_DIRECTORY_BYTES, MAX_ZIP_ENTRIES, require_within
from hf_megatron.checkpoint.section import size_of
from hf_megatron.errors import shown

ZIP_MAGIC = b"PK\x03\x04"
# The last record of an archive, without a comment.
_END = struct.Struct("<4s4H2LH")
_END_MAGIC = b"PK\x05\x06"
# What stands before it in archives of more than 4 GiB, and in all that torch has written: a record of 64-bit numbers,
# and the place of that record.
_LONG_END = struct.Struct("<4sQ2H2L4Q")
_LONG_END_MAGIC = b"PK\x06\x06"
_LOCATOR = struct.Struct("<4sLQL")
_LOCATOR_MAGIC = b"PK\x06\x07"
# An entry of the directory, and the header before an entry's data.
_ENTRY = struct.Struct("<4s6H3L5H2L")
_ENTRY_MAGIC = b"PK\x01\x02"
_LOCAL = struct.Struct("<4s5H3L2H")

_LONG_16, _LONG_32 = 0xFFFF, 0xFFFFFFFF  # in place of a number that stands elsewhere, in 64 bits
_LONG_NUMBERS, _OTHER_NAME = 1, 0x7075  # extra fields: those numbers; a name that some readers prefer
# Flags: encryption (of entries, strong, of the directory), patches, sizes that follow the data.
_IS_ENCRYPTED, _IS_PATCH, _SIZES_FOLLOW = 1 << 0 | 1 << 6 | 1 << 13, 1 << 5, 1 << 3
# The folder is called like the file, its content has plain names.
_NAME = re.compile(r"([ -.0-\[\]-~]+)((?:/[\w.-]+)+)", re.ASCII)


class ZipError(ValueError):
    """An archive that torch.save has not written, or that was damaged since."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the archive."""

    name: str  # with the folder's
    size: int
    header: int  # offset of the local header
    flags: int


def is_archive(file: BinaryIO) -> bool:
    """Whether it ends as an archive does that has no comment."""
    size = size_of(file)
    last = _read(file, size - _END.size, _END.size) if size >= _END.size else b""
    return last.startswith(_END_MAGIC) and last.endswith(bytes(2))


def read_directory(file: BinaryIO) -> dict[str, Entry]:
    """The entries of an archive by their names without the folder's.

    ZipError if it is not of the one form that is read, BudgetError if it is beyond a limit.
    """
    start, stop, count = _place(file)
    require_within(MAX_ZIP_DIRECTORY_BYTES, stop - start, "bytes in its directory")
    require_within(MAX_ZIP_ENTRIES, count, "entries in its directory")
    directory = _read(file, start, stop - start)
    entries: dict[str, Entry] = {}
    folder, position = "", 0
    names: set[str] = set()
    for _ in range(count):
        entry, position = _entry(directory, position)
        parts = _NAME.fullmatch(entry.name)
        if parts is None or {".", ".."} & set(entry.name.split("/")):
            raise ZipError(f"its entry {shown(entry.name)} has a name that torch.save gives to nothing")
        folder = folder or parts[1]
        if parts[1] != folder:
            raise ZipError(f"its entries lie in two folders, {shown(folder)} and {shown(parts[1])}")
        # Some readers find names whatever their case.
        if entry.name.lower() in names:
            raise ZipError(f"it has two entries {shown(entry.name)}")
        names.add(entry.name.lower())
        entries[parts[2][1:]] = entry
    if position != len(directory):
        raise ZipError(f"its directory has {len(directory)} bytes, of which {position} are entries")
    return entries


def data_start(file: BinaryIO, entry: Entry) -> int:
    """Offset of an entry's data: after its local header, which must not contradict the directory."""
    raw = _read(file, entry.header, _LOCAL.size)
    magic, _, flags, method, _, _, _, packed, size, name_length, extra_length = _LOCAL.unpack(raw)
    name = _read(file, entry.header + _LOCAL.size, name_length) if magic == ZIP_MAGIC else b""
    sizes = {entry.size, _LONG_32} | ({0} if flags & _SIZES_FOLLOW else set())
    if (name, flags, method) != (entry.name.encode(), entry.flags, 0) or {packed, size} - sizes:
        raise ZipError(f"the header at byte {entry.header} is not that of {shown(entry.name)} in its directory")
    return entry.header + _LOCAL.size + int(name_length) + int(extra_length)


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    data = file.read(size)
    if len(data) != size:
        raise ZipError(f"it ends before byte {position + size}")
    return data


def _place(file: BinaryIO) -> tuple[int, int, int]:
    """Where the directory starts and stops, and its number of entries."""
    if not is_archive(file):
        raise ZipError("it does not end as an archive does")
    end = size_of(file) - _END.size
    _, disk, first_disk, count, total, size, start, _ = _END.unpack(_read(file, end, _END.size))
    short, stop = (disk, first_disk, count, total, size, start), end
    place = end - _LOCATOR.size
    locator = _LOCATOR.unpack(_read(file, place, _LOCATOR.size)) if place >= 0 else (b"",)
    if locator[0] == _LOCATOR_MAGIC:
        stop = place - _LONG_END.size
        record = _LONG_END.unpack(_read(file, max(stop, 0), _LONG_END.size))
        magic, record_size, _, _, disk, first_disk, count, total, size, start = record
        long = (disk, first_disk, count, total, size, start)
        limits = (_LONG_16,) * 4 + (_LONG_32,) * 2
        is_same = all(a in (b, limit) for a, b, limit in zip(short, long, limits, strict=True))
        if locator[2] != stop or magic != _LONG_END_MAGIC or record_size != _LONG_END.size - 12 or not is_same:
            raise ZipError("its two records of the directory contradict each other")
    if disk or first_disk or count != total or start + size != stop:
        raise ZipError(f"its directory is said to be bytes {start} to {start + size}, and ends at byte {stop}")
    return start, stop, count


def _entry(directory: bytes, position: int) -> tuple[Entry, int]:
    """The entry at a position of the directory, and the position after it."""
    fields = _ENTRY.unpack_from(directory, position) if position + _ENTRY.size <= len(directory) else (b"",) * 17
    if fields[0] != _ENTRY_MAGIC:
        raise ZipError(f"its directory holds no entry at its byte {position}")
    _, made_by, _, flags, method, _, _, _, packed, size, *lengths, disk, _, attributes, header = fields
    ends = [position + _ENTRY.size]
    for length in lengths:
        ends.append(ends[-1] + length)
    if ends[-1] > len(directory):
        raise ZipError(f"its directory ends within the entry at its byte {position}")
    name = directory[ends[0] : ends[1]].decode("ascii", "backslashreplace")
    (size, packed, header), rest = _long_numbers(directory[ends[1] : ends[2]], (size, packed, header))
    if flags & (_IS_ENCRYPTED | _IS_PATCH) or method or packed != size:
        how = "encrypted" if flags & _IS_ENCRYPTED else "compressed"
        raise ZipError(f"its entry {shown(name)} is {how}, and torch.save stores bytes as they are")
    mode = attributes >> 16
    if lengths[2] or disk or rest or (made_by >> 8 and stat.S_IFMT(mode) not in (0, stat.S_IFREG)):
        raise ZipError(f"its entry {shown(name)} is a link, or something else that torch.save does not write")
    return Entry(name, size, header, flags), ends[-1]


def _long_numbers(extra: bytes, numbers: tuple[int, ...]) -> tuple[list[int], bool]:
    """Numbers of which some stand in the extra field, in 64 bits; and whether that holds anything else of meaning."""
    result, strange, seen = list(numbers), False, False
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        content, extra = extra[4 : 4 + length], extra[4 + length :]
        strange |= kind == _OTHER_NAME
        if kind == _LONG_NUMBERS:
            longs = [index for index, number in enumerate(numbers) if number == _LONG_32]
            strange |= seen or len(content) != length or length != 8 * len(longs)
            seen = True
            if not strange:
                for index, value in zip(longs, struct.unpack(f"<{len(longs)}Q", content), strict=True):
                    result[index] = value
    return result, strange
