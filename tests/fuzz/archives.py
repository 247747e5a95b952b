"""Strategies for files of ``torch.save``: zip archives, record by record, and the pickles of files before torch 1.6."""

from __future__ import annotations

import io
import pickletools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.guard import CANARY
from tests.fuzz.pickles import Draw, edited, pick, rarely, whole

_EVIL = b"\x80\x02c%s\nfire\n)R." % CANARY.encode()
_SIZES = [0, 1, 100, 2**16, 2**31, 2**32 - 1]
_LONG = [0, 1, 2**32, 2**63, 2**64 - 1]


@dataclass(frozen=True)
class Record:
    """An entry of a zip archive; whatever is said of it before the data and in the directory may be overridden."""

    name: bytes
    data: bytes
    method: int = zipfile.ZIP_STORED
    flags: int = 0
    local: dict[str, Any] = field(default_factory=dict)  # fields of the header before the data
    central: dict[str, Any] = field(default_factory=dict)  # fields of its entry in the directory

    @property
    def stored(self) -> bytes:
        if self.method == zipfile.ZIP_STORED:
            return self.data
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", self.method) as archive:
            archive.writestr("x", self.data)
            start, info = 31, archive.getinfo("x")
        return buffer.getvalue()[start : start + info.compress_size]

    def _fields(self, overrides: dict[str, Any]) -> dict[str, Any]:
        fields = {"name": self.name, "method": self.method, "flags": self.flags, "crc": zlib.crc32(self.data)}
        return {**fields, "packed": len(self.stored), "size": len(self.data), "extra": b"", **overrides}

    def header(self) -> bytes:
        f = self._fields(self.local)
        numbers = (20, f["flags"], f["method"], 0, 33, f["crc"], f["packed"], f["size"], len(f["name"]))
        return struct.pack("<4s5H3L2H", b"PK\3\4", *numbers, len(f["extra"])) + bytes(f["name"] + f["extra"])

    def entry(self, offset: int) -> bytes:
        f = self._fields(self.central)
        numbers = (20, 20, f["flags"], f["method"], 0, 33, f["crc"], f["packed"], f["size"], len(f["name"]))
        rest = (len(f["extra"]), 0, 0, 0, 0, f.get("offset", offset))
        return struct.pack("<4s6H3L5H2L", b"PK\1\2", *numbers, *rest) + bytes(f["name"] + f["extra"])


@dataclass(frozen=True)
class Archive:
    """A zip archive, of which the end may be overridden."""

    records: Sequence[Record]
    comment: bytes = b""
    end: dict[str, int] = field(default_factory=dict)
    hidden: Sequence[int] = ()  # records that the directory does not have
    tail: bytes = b""

    def build(self) -> bytes:
        content, directory, count = b"", b"", 0
        for index, record in enumerate(self.records):
            if index not in self.hidden:
                directory, count = directory + record.entry(len(content)), count + 1
            content += record.header() + record.stored
        end = {"count": count, "size": len(directory), "offset": len(content), **self.end}
        numbers = (0, 0, end["count"] % 2**16, end["count"] % 2**16, end["size"], end["offset"], len(self.comment))
        return content + directory + struct.pack("<4s4H2LH", b"PK\5\6", *numbers) + self.comment + self.tail


def records_of(content: bytes) -> list[Record]:
    """The entries of an archive of torch."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [Record(info.filename.encode(), archive.read(info)) for info in archive.infolist()]


def _new_name(draw: Draw, name: bytes) -> bytes:
    root, _, rest = name.partition(b"/")
    names = [
        rest,
        b"/" + name,
        b"other/" + rest,
        root + b"//" + rest,
        root + b"/./" + rest,
        name + b"\0x",
        name.upper(),
    ]
    names += [b"../" + name, root + b"\\" + rest, root + b"/" + rest.upper(), b"a" * 300, b"\xff" + name, name + b"/"]
    names += [root + b"/constants.pkl", root + b"/byteorder", root + b"/.data/serialization_id", root + b"/version"]
    return pick(draw, names)


def _unicode_path(name: bytes, old: bytes) -> bytes:
    """The extra field by which a record has another name than its own."""
    body = b"\1" + struct.pack("<L", zlib.crc32(old)) + name
    return struct.pack("<2H", 0x7075, len(body)) + body


_CHANGES = ["twice", "twice", "rename", "root", "compress", "sizes", "zip64", "flags", "extra", "offset", "method"]
_CHANGES += ["crc", "drop", "swap", "comment", "end", "hidden", "tail", "prefix", "byteorder", "pad"]


def archive(draw: Draw, seed: bytes, most: int = 2) -> bytes:
    """An archive of torch with a changed pickle, changed records or both."""
    records = records_of(seed)
    place = next(index for index, record in enumerate(records) if record.name.endswith(b"/data.pkl"))
    pickle = whole(draw) if rarely(draw, 5) else edited(draw, records[place].data, most=pick(draw, [0, 1, 3]))
    records[place] = replace(records[place], data=pickle)
    result = Archive(records)
    for _ in range(draw(st.integers(0, most))):
        result = _changed(draw, result)
    return pick(draw, [b"\0" * 64, b"PK\3\4"]) + result.build() if result.end.get("prefix") else result.build()


def _changed(draw: Draw, result: Archive) -> Archive:
    records = list(result.records)
    pickled = [index for index, record in enumerate(records) if record.name.endswith(b"data.pkl")]
    at = pick(draw, pickled * 4 + list(range(len(records))))
    record = records[at]
    side = pick(draw, ["local", "central"])

    def put(**fields: Any) -> None:
        changed: dict[str, Any] = {side: {**getattr(record, side), **fields}}
        records[at] = replace(record, **changed)

    match pick(draw, _CHANGES):
        case "twice":
            data = pick(draw, [_EVIL, record.data, b"", record.data[:-1] + b"\1" if record.data else b"x"])
            name = pick(draw, [record.name, record.name, record.name.upper(), _new_name(draw, record.name)])
            where = pick(draw, [0, at, at + 1, len(records)])
            records.insert(where, Record(name, data))
        case "rename":
            name = _new_name(draw, record.name)
            records[at] = replace(record, name=name) if draw(st.booleans()) else record
            if records[at] is record:
                put(name=name)
        case "root":
            records = [
                replace(r, name=b"other/" + r.name.partition(b"/")[2]) if draw(st.booleans()) else r for r in records
            ]
        case "compress":
            data = pick(draw, [record.data, b"\0" * 10**7, b"little" + b"\0" * 30 * 10**6])
            method = pick(draw, [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
            records[at] = replace(record, data=data, method=method)
        case "sizes":
            put(**{name: pick(draw, _SIZES) for name in pick(draw, [("size",), ("packed",), ("size", "packed")])})
        case "zip64":
            body = struct.pack("<3Q", *(pick(draw, [*_LONG, len(record.data)]) for _ in range(3)))
            body = body[: pick(draw, [0, 4, 8, 16, 24])]
            put(size=2**32 - 1, packed=2**32 - 1, extra=struct.pack("<2H", 1, len(body)) + body)
        case "flags":
            put(flags=pick(draw, [1, 8, 0x20, 0x40, 0x800, 0x2000, 0xFFFF]))
        case "extra":
            raw = [
                b"\1",
                b"\xff" * 8,
                b"FB\xff\xff",
                b"FB\4\0ZZZZ",
                _unicode_path(_new_name(draw, record.name), record.name),
            ]
            raw += [_unicode_path(records[pickled[0]].name, record.name)] if pickled else []
            put(extra=pick(draw, raw))
        case "offset":
            side = "central"
            put(offset=pick(draw, [0, 1, 64, 2**31, 2**32 - 1]))
        case "method":
            put(method=pick(draw, [1, 8, 9, 12, 14, 93, 99, 2**16 - 1]))
        case "crc":
            put(crc=0)
        case "drop":
            del records[at]
        case "swap":
            other = pick(draw, range(len(records)))
            records[at], records[other] = records[other], records[at]
        case "comment":
            inner = Archive([Record(b"inner/data.pkl", _EVIL)]).build()
            result = replace(result, comment=pick(draw, [b"x", b"PK\5\6" + b"\0" * 18, b"\0" * 65535, inner]))
        case "end":
            number = pick(draw, ["count", "size", "offset"])
            result = replace(result, end={**result.end, number: pick(draw, _SIZES)})
        case "hidden":
            result = replace(result, hidden=[at])
        case "tail":
            inner = Archive([Record(b"model/data.pkl", _EVIL)]).build()
            result = replace(result, tail=pick(draw, [b"\0", b"\0" * 70000, inner]))
        case "prefix":
            result = replace(result, end={**result.end, "prefix": 1})
        case "byteorder":
            root = records[0].name.partition(b"/")[0] if records else b"x"
            records.append(Record(root + b"/byteorder", pick(draw, [b"big", b"", b"little\n", b"LITTLE"])))
        case "pad":
            records[at] = replace(record, data=record.data + pick(draw, [b"\0", _EVIL, b"x" * 1000]))
    return replace(result, records=records)


def split_legacy(content: bytes) -> list[bytes]:
    """The five pickles of a file of before torch 1.6, and what follows them."""
    stream, parts, start = io.BytesIO(content), list[bytes](), 0
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        parts.append(content[start : stream.tell()])
        start = stream.tell()
    return [*parts, content[start:]]


def legacy(draw: Draw, seed: bytes) -> bytes:
    """A file of before torch 1.6 with some of its pickles, their order or the storages' sizes changed."""
    if rarely(draw, 16):
        return _in_a_tar(seed)
    parts = split_legacy(seed)
    for _ in range(draw(st.integers(0, 2))):
        at = pick(draw, [0, 1, 2, 3, 3, 3, 3, 4, 4, 5])
        if at == 5:
            sizes = [struct.pack("<q", pick(draw, [0, -1, 1, 2**31, 2**63 - 1, -(2**63)])), b"", b"\0" * 5]
            parts[5] = pick(draw, sizes) + parts[5][8:]
            continue
        change = pick(draw, ["edit", "edit", "edit", "whole", "evil", "computed", "again", "drop"])
        new = {"evil": _EVIL, "again": parts[at] * 2, "drop": b""}.get(change)
        if change == "whole":
            new = whole(draw)
        elif change == "computed":  # the right value, and a call that it drops
            new = parts[at][:-1] + _EVIL[2:-1] + b"0."
        parts[at] = edited(draw, parts[at]) if new is None else new
    return b"".join(parts)


def _in_a_tar(content: bytes) -> bytes:
    """What torch takes for a tar archive of torch 0.1 and a reader of pickles for a file of torch 1.5.

    The name of the archive's first file is the start of the legacy file, whose fourth pickle drops the rest.
    """
    parts = split_legacy(content)
    pickles = {"storages": b"\x80\x02K\0.\x80\x02].", "tensors": b"\x80\x02K\0."}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in pickles.items():
            _add(archive, name, data)
        _add(archive, "pickle", _EVIL)
    inner = buffer.getvalue()
    start = parts[0] + parts[1] + b"\x80\x02N.\x80\x02"
    header = bytearray(512)
    header[:100] = (start + b"T" + struct.pack("<i", 512 - len(start) - 5 + len(inner)))[:100].ljust(100, b"\1")
    header[100:156] = b"0000644\0" + b"0000000\0" * 2 + b"00000000000\0" * 2 + b"        "
    header[156:157] = b"0"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + inner + b"0" + parts[3][2:] + parts[4] + parts[5]


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@st.composite
def torch_files(draw: Draw, zips: Sequence[bytes], legacies: Sequence[bytes]) -> bytes:
    """A changed file of either kind."""
    if rarely(draw, 4):
        return legacy(draw, pick(draw, legacies))
    return archive(draw, pick(draw, zips))
