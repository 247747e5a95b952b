"""Files of ``torch.save``: tensors found by their place in the file, and nothing in it run."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron.checkpoint.torch_file import TENSOR_GLOBALS, StoredArray, open_torch_file
from hf_megatron.checkpoint.unpickle import COMPUTED, Call, Global, Key, UnpickleError, globals_in, read_pickle
from hf_megatron.errors import CheckpointError, CheckpointFormatError, CheckpointIncompleteError


def _save(path: Path, content: Any, is_zip: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def is_zip(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


_INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, *_INTEGERS], ids=str)
def test_every_dtype(tmp_path: Path, is_zip: bool, dtype: torch.dtype) -> None:
    """Catches a type whose size or spelling is another one's."""
    tensor = torch.randint(0, 2, (5, 7)).to(dtype)
    found = open_torch_file(_save(tmp_path / "x.pt", {"a": torch.zeros(3), "x": tensor}, is_zip))["x"].lazy("x")
    assert torch.equal(found.read(), tensor)
    assert torch.equal(found[1:3, 2:], tensor[1:3, 2:])


def test_views(tmp_path: Path, is_zip: bool) -> None:
    """Catches a view's own shape taken for how its storage lies, or storages that views share counted twice."""
    whole = torch.arange(600.0).view(20, 30)
    views = {
        "whole": whole,
        "transposed": whole.t(),
        "box": whole[3:15, 7:22],
        "column": whole[:, 7],
        "steps": whole[::3, ::2],
        "one row": whole[4].expand(1, 30),
        "scalar": whole[2, 3],
        "empty": whole[:0],
        "parameter": torch.nn.Parameter(whole[1:3]),
        "other": torch.ones(4),
    }
    stored = open_torch_file(_save(tmp_path / "x.pt", views, is_zip))
    for name, view in views.items():
        tensor = stored[name].lazy(name)
        assert torch.equal(tensor.read(), view), name
        if view.dim() == 2 and view.numel():
            assert torch.equal(tensor[1:5, 2:9], view[1:5, 2:9]), name


def test_nothing_is_read_but_the_pickle(tmp_path: Path) -> None:
    """Catches a file of gigabytes read, or mapped, to find out what is in it."""
    path = _save(tmp_path / "x.pt", {"x": torch.zeros(1_000_000)}, is_zip=True)
    content = bytearray(path.read_bytes())
    stored = open_torch_file(path)["x"]
    assert stored.start > 0
    # Bytes that change after opening are what is read.
    content[stored.start : stored.start + 4] = struct.pack("<f", 7.0)
    path.write_bytes(content)
    assert stored.lazy("x")[0:1].item() == 7.0


def test_containers_and_objects(tmp_path: Path, is_zip: bool) -> None:
    """Catches nesting lost, an attribute of a dictionary taken for an item, and objects made in place of records."""
    state = OrderedDict(a=torch.zeros(2))
    state._metadata = {"version": 1}  # type: ignore[attr-defined]
    content = {"n": {"state": state, "number": 3, "none": None}, "where": Path("x"), "list": [1, (2, 3)], 5: b"bytes"}
    allowed = TENSOR_GLOBALS | globals_in("pathlib", "PosixPath") | globals_in("_codecs", "encode")
    found = open_torch_file(_save(tmp_path / "x.pt", content, is_zip), allowed)
    assert isinstance(found["n"]["state"]["a"], StoredArray)
    assert (found["n"]["number"], found["n"]["none"], found["list"]) == (3, None, [1, (2, 3)])
    assert isinstance(found["where"], Call)
    assert found["where"].function == Global("pathlib", "PosixPath")
    assert [key.value for key in found if isinstance(key, Key)] == [5]


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(protocol: int) -> None:
    """Catches an instruction of one protocol that is not known, or does something else."""
    value: dict[Any, Any] = {
        "ints": [0, 1, 255, 256, 65535, 65536, -1, -129, 2**31, -(2**31), 2**63, -(2**63), 2**64 - 1],
        "floats": [0.0, -1.5, 1e300, float("inf")],
        "text": ["", "a", "\u00e4\u4e2d", "x" * 300, "new\nline"],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "other": [True, False, None],
        "nested": {"nested": {}},
    }
    value["again"] = value["ints"]
    assert read_pickle(io.BytesIO(pickle.dumps(value, protocol))).value == value
    if protocol >= 3:
        assert read_pickle(io.BytesIO(pickle.dumps([b"", b"x" * 300], protocol))).value == [b"", b"x" * 300]


class _Traced:
    """Counts how often it comes into being."""

    count = 0

    def __init__(self, number: int) -> None:
        _Traced.count += 1
        self.number = number

    def __setstate__(self, state: Any) -> None:
        _Traced.count += 1


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_imported_or_made(monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    """Catches a reader that looks up, calls or makes anything a pickle names."""
    data = pickle.dumps([_Traced(3), {1, 2}, frozenset({3}), bytearray(b"x"), complex(1, 2)], protocol)
    _Traced.count = 0
    # Recorded, not refused: Python itself may import something of its own meanwhile.
    imported: list[str] = []
    original = builtins.__import__

    def recording(name: str, *rest: Any, **options: Any) -> Any:
        imported.append(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", recording)
    found = read_pickle(io.BytesIO(data))
    monkeypatch.undo()
    assert not {name.module for name in found.names} & set(imported)
    assert _Traced.count == 0
    assert any(name.attribute == "_Traced" for name in found.names)
    assert isinstance(found.value[0], Call)


def test_names_are_those_of_today() -> None:
    """Catches a file that hides a function behind the name that Python 2 or the implementation has for it."""
    for protocol in (2, 4):
        for function, name in ((eval, "builtins.eval"), (os.system, "os.system")):
            read = read_pickle(io.BytesIO(pickle.dumps(function, protocol)))
            assert read.refused(()) == [name]
            assert read.value == read.names[0]


def test_what_a_pickle_computes_is_named() -> None:
    """Catches a function that no name in the pickle stands for, such as the result of getattr."""
    data = b"cbuiltins\ngetattr\n(cos\npath\nVjoin\ntR(Va\ntR."
    names = read_pickle(io.BytesIO(data)).names
    assert names == (Global("builtins", "getattr"), Global("os", "path"), COMPUTED)


@pytest.mark.parametrize(
    "data", [b"", b".", b"N", b"\x80\x02", b"0.", b"(.", b"h\x07.", b"\x80\x02K\x01K\x02.", b"Q.", b"\x98.", b"]N\x8f."]
)
def test_what_is_no_pickle(data: bytes) -> None:
    """Catches damaged bytes that end in another exception, or in a value."""
    with pytest.raises(UnpickleError):
        read_pickle(io.BytesIO(data))


def _grow(entries: dict[str, bytes]) -> None:
    """Give x, of shape (10, 20), 127 rows."""
    assert entries["x/data.pkl"].count(b"K\nK\x14\x86") == 1
    entries["x/data.pkl"] = entries["x/data.pkl"].replace(b"K\nK\x14\x86", b"K\x7fK\x14\x86")


@pytest.mark.parametrize(
    ("change", "compression", "kind", "message"),
    [
        (lambda entries: None, zipfile.ZIP_DEFLATED, CheckpointFormatError, "compressed"),
        (lambda entries: entries.update({"x/byteorder": b"big"}), 0, CheckpointFormatError, "big-endian"),
        (lambda entries: entries.pop("x/data/0"), 0, CheckpointIncompleteError, "lacks the data"),
        (lambda entries: entries.update({"x/data/0": b"1"}), 0, CheckpointIncompleteError, "has 1 bytes, 800 are"),
        (lambda entries: entries.pop("x/data.pkl"), 0, CheckpointIncompleteError, "without data.pkl"),
        (_grow, 0, CheckpointIncompleteError, "larger than its data"),
    ],
    ids=["compressed", "big-endian", "lost", "short", "no-pickle", "grown"],
)
def test_archives_that_are_not_torch_s(
    tmp_path: Path,
    change: Callable[[dict[str, bytes]], Any],
    compression: int,
    kind: type[CheckpointError],
    message: str,
) -> None:
    """Catches a compressed entry read as if it were not, other byte orders, and a shape beyond its data."""
    path = _save(tmp_path / "x.pt", {"x": torch.zeros(10, 20)}, is_zip=True)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    change(entries)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(kind, match=message):
        open_torch_file(path)


def test_where_there_is_no_file(tmp_path: Path) -> None:
    """Catches a traceback for a directory or a link that leads to itself."""
    loop = tmp_path / "loop.pt"
    loop.symlink_to(loop)
    for path in (loop, tmp_path / "none.pt"):
        with pytest.raises(CheckpointIncompleteError, match="cannot be read"):
            open_torch_file(path)
    with pytest.raises(CheckpointFormatError, match="is a directory, not a file"):
        open_torch_file(tmp_path)
