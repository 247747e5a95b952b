"""Archives in which another reader finds another pickle: each is refused, whatever is in it."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_megatron.checkpoint.torch_file import open_torch_file
from hf_megatron.errors import CheckpointFormatError
from tests.checkpoint.hostile import EVIL, entries, saved, zipped

_END = 22


def _refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointFormatError, match=message):
        open_torch_file(path)


def test_what_torch_and_zipfile_write_is_read(tmp_path: Path) -> None:
    """Catches archives refused that torch.save, other names, or a rewritten archive give."""
    for name in ("x.pt", "a b (1).bin", "x.y.z"):
        path = saved(tmp_path / name)
        assert torch.equal(open_torch_file(path)["x"].lazy("x").read(), torch.arange(6.0).reshape(2, 3))
        zipped(path, entries(path))
        assert torch.equal(open_torch_file(path)["x"].lazy("x").read(), torch.arange(6.0).reshape(2, 3))


_SECOND = {
    "again": ("x/data.pkl", "two entries 'x/data.pkl'"),
    "in capitals": ("x/DATA.pkl", "two entries 'x/DATA.pkl'"),
    "in another folder": ("y/data.pkl", "two folders, 'x' and 'y'"),
    "without a folder": ("data.pkl", "a name that torch.save gives to nothing"),
    "outside": ("x/../data.pkl", "a name that torch.save gives to nothing"),
    "here": ("x/./data.pkl", "a name that torch.save gives to nothing"),
    "absolute": ("/x/data.pkl", "a name that torch.save gives to nothing"),
    "twice parted": ("x//data.pkl", "a name that torch.save gives to nothing"),
    "with a backslash": ("x\\data.pkl", "a name that torch.save gives to nothing"),
    "with a NUL": ("x/data.pkl\0y", "a name that torch.save gives to nothing"),
    "with an escape": ("x/\x1b[2Jdata.pkl", r"entry 'x/\\x1b\[2Jdata.pkl'"),
    "with letters of another script": ("x/d\u0430ta.pkl", "a name that torch.save gives to nothing"),
    "a folder": ("x/data/", "a name that torch.save gives to nothing"),
    "TorchScript": ("x/constants.pkl", "is a TorchScript program"),
}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("name", "message"), _SECOND.values(), ids=_SECOND)
def test_a_second_pickle(tmp_path: Path, name: str, message: str, is_first: bool) -> None:
    """Catches another pickle than the one that was judged, found by a reader that takes the first, the last, ..."""
    content = entries(saved(tmp_path / "x.bin"))
    path = tmp_path / "y.bin"
    with pytest.MonkeyPatch.context() as patched:
        # ZipInfo cuts a name at NUL.
        patched.setattr(zipfile.ZipInfo, "__init__", _init)
        zipped(path, [(name, EVIL), *content] if is_first else [*content, (name, EVIL)])
    if is_first and "two folders" in message:
        message = "two folders, 'y' and 'x'"
    elif is_first and "two entries" in message:
        message = "two entries 'x/data.pkl'"
    _refused(path, message)


_original_init = zipfile.ZipInfo.__init__


def _init(self: zipfile.ZipInfo, filename: str = "NoName", date_time: tuple[int, ...] = (1980, 1, 1, 0, 0, 0)) -> None:
    _original_init(self, filename, date_time)  # type: ignore[arg-type]
    self.filename = filename


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("name", ["data.pkl", "byteorder", "data/0", ".data/serialization_id"])
def test_a_compressed_entry(tmp_path: Path, compression: int, name: str) -> None:
    """Catches kilobytes that are gigabytes when unpacked, in any entry."""
    content = entries(saved(tmp_path / "x.bin"))
    path = tmp_path / "y.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in content:
            is_it = entry == f"x/{name}"
            archive.writestr(entry, data, compression if is_it else zipfile.ZIP_STORED)
    _refused(path, f"its entry 'x/{name}' is compressed")


def _change(offset: int, layout: str, value: int, magic: bytes = b"PK\x01\x02") -> Callable[[bytearray], None]:
    """Another number in the first record of a kind."""

    def change(data: bytearray) -> None:
        struct.pack_into(layout, data, data.rindex(magic) + offset, value)

    return change


def _prefix(data: bytearray) -> None:
    data[:0] = bytes(data[:64])


def _comment(data: bytearray) -> None:
    struct.pack_into("<H", data, len(data) - 2, 4)
    data += b"more"


def _gap(data: bytearray) -> None:
    """Bytes between the directory and its end."""
    data[-_END:-_END] = bytes(8)


def _second_directory(data: bytearray) -> None:
    """One before which zipfile looks, and one where the end says that it is."""
    size, start = struct.unpack("<LL", data[-10:-2])
    directory = bytes(data[start : start + size])
    data[-_END:-_END] = directory


_DAMAGES: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "encrypted": (_change(8, "<H", 1), "is encrypted"),
    "link": (_change(38, "<L", 0o120777 << 16), "is a link"),
    "other disk": (_change(34, "<H", 1), "is a link, or something else"),
    "sizes differ": (_change(20, "<L", 1), "is compressed"),
    "name differs": (_change(26, "<H", 8, b"PK\x03\x04"), "is not that of"),
    "method differs": (_change(8, "<H", 8, b"PK\x03\x04"), "is not that of"),
    "size differs": (_change(22, "<L", 8, b"PK\x03\x04"), "is not that of"),
    "header elsewhere": (_change(42, "<L", 5), "is not that of"),
    "header beyond": (_change(42, "<L", 2**31), "it ends before byte"),
    "count": (_change(10, "<H", 1, b"PK\x05\x06"), "its directory is said to be"),
    "start": (_change(16, "<L", 0, b"PK\x05\x06"), "its directory is said to be"),
    "prefix": (_prefix, "its directory is said to be"),
    "comment": (_comment, "does not end as an archive does"),
    "gap": (_gap, "its directory is said to be"),
    "second directory": (_second_directory, "its directory is said to be"),
    "trailing": (lambda data: data.extend(b"more"), "does not end as an archive does"),
}


@pytest.mark.parametrize(("damage", "message"), _DAMAGES.values(), ids=_DAMAGES)
def test_archives_that_contradict_themselves(tmp_path: Path, damage: Callable[[bytearray], None], message: str) -> None:
    """Catches a directory found elsewhere than another reader finds it, or headers that say something else."""
    content = entries(saved(tmp_path / "x.bin"))
    # The last entry is the first one that is read.
    path = zipped(tmp_path / "y.bin", sorted(content, key=lambda entry: entry[0] == "x/data.pkl"))
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    _refused(path, message)


@pytest.mark.parametrize(
    ("magic", "offset", "value"),
    [(b"PK\x06\x07", 8, 1), (b"PK\x06\x06", 4, 45), (b"PK\x06\x06", 32, 1), (b"PK\x06\x06", 48, 1)],
    ids=["locator", "record size", "count", "start"],
)
def test_64_bit_records_that_contradict_the_others(tmp_path: Path, magic: bytes, offset: int, value: int) -> None:
    """Catches a directory in 64 bits that one reader follows and another does not."""
    path = saved(tmp_path / "x.bin")
    data = bytearray(path.read_bytes())
    _change(offset, "<Q", value, magic)(data)
    path.write_bytes(data)
    _refused(path, "contradict each other|is said to be")


def test_names_in_extra_fields(tmp_path: Path) -> None:
    """Catches an entry that has another name for readers that prefer the one in an extra field."""
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("x/version")
        info.extra = struct.pack("<HHBL", 0x7075, 15, 1, 0) + b"x/data.pkl"
        archive.writestr(info, EVIL)
        archive.writestr(zipfile.ZipInfo("x/data.pkl"), b"}.")
    _refused(path, "something else that torch.save does not write")


def test_bytes_behind_the_pickle(tmp_path: Path) -> None:
    """Catches a second pickle in data.pkl that nobody has judged."""
    content = [(n, b"}." + EVIL if n == "x/data.pkl" else data) for n, data in entries(saved(tmp_path / "x.bin"))]
    _refused(zipped(tmp_path / "y.bin", content), "goes on behind the pickle")
