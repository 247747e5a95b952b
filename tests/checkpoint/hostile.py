"""Files made to run code or to take memory without an end, for the tests; nothing in them runs here."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

EVIL = b"cos\nsystem\n(X\x04\x00\x00\x00truetR."
"""A pickle that runs a command where it is loaded."""
LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)


def legacy(path: Path, content: bytes = b"}.", system: bytes = SYSTEM, keys: bytes = b"].", data: bytes = b"") -> Path:
    """A file of torch before 1.6 of these pickles."""
    path.write_bytes(LEGACY_START + system + content + keys + data)
    return path


def storage_id(numel: int, *, view: tuple[str, int, int] | None = None, is_legacy: bool = False) -> bytes:
    """Instructions that push storage 0, of float32."""
    rest = ("cpu", numel, view) if is_legacy else ("cpu", numel)
    items = b"".join(pickle.dumps(item, 2)[2:-1] for item in rest)
    return b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + items + b"tQ"


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], storage: bytes, offset: int = 0) -> bytes:
    """Instructions that push a tensor of a storage."""
    sizes = b"".join(pickle.dumps(item, 2)[2:-1] for item in (offset, shape, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + sizes + b"\x89ccollections\nOrderedDict\n)RtR"


def named(**values: bytes) -> bytes:
    """The pickle of a dictionary."""
    return b"\x80\x02}" + b"".join(_text(name) + value + b"s" for name, value in values.items()) + b"."


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def saved(path: Path, content: Any = None, *, is_zip: bool = True) -> Path:
    """A file as torch writes it."""
    content = {"x": torch.arange(6.0).reshape(2, 3)} if content is None else content
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


def entries(path: Path) -> list[tuple[str, bytes]]:
    """Those of an archive."""
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def with_pickle(path: Path, data: bytes) -> Path:
    """An archive of torch with another pickle in it."""
    content = entries(saved(path))
    return zipped(path, [(name, data if name.endswith("data.pkl") else old) for name, old in content])


def zipped(path: Path, content: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive of these entries, in this order, also of two with one name."""
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return path
