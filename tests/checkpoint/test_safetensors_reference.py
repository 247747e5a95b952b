"""Headers of safetensors files: those are read that the reference implementation reads, and no others."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from hf_megatron.checkpoint.safetensors_header import DTYPES, read_header
from hf_megatron.errors import CheckpointError, CheckpointFormatError

_TENSOR = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
_UNSUPPORTED = {"F4", "F6_E2M3", "F6_E3M2"}  # of less than a byte


def _file(path: Path, header: str | bytes, data: bytes = bytes(8)) -> Path:
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def _ours(path: Path) -> dict[str, Any] | None:
    """Dtypes, shapes and the number of bytes, by name; None if it is refused."""
    try:
        header = read_header(path)
    except CheckpointError:
        return None
    return {n: (t.dtype, list(t.shape), t.data_stop - t.data_start) for n, t in header.tensors.items()}


def _reference(path: Path) -> dict[str, Any] | None:
    try:
        found = deserialize(path.read_bytes())
    except SafetensorError:
        return None
    return {name: (tensor["dtype"], list(tensor["shape"]), len(tensor["data"])) for name, tensor in found}


def _with(**fields: str) -> str:
    """A header of one tensor with other fields, in JSON."""
    known = {"dtype": '"F32"', "shape": "[2]", "data_offsets": "[0, 8]"} | fields
    fields_of_a = ", ".join(f"{json.dumps(name)}: {value}" for name, value in known.items())
    return f'{{"a": {{{fields_of_a}}}}}'


_HEADERS: dict[str, str | bytes] = {
    "plain": f"{{{_TENSOR}}}",
    "spaces": f" \t\r\n{{{_TENSOR}}}\n  ",
    "trailing": f"{{{_TENSOR}}}x",
    "trailing NUL": f"{{{_TENSOR}}}\0",
    "comma": f"{{{_TENSOR},}}",
    "nothing": "",
    "null": "null",
    "list": "[]",
    "mark of byte order": b"\xef\xbb\xbf" + f"{{{_TENSOR}}}".encode(),
    "UTF-16": f"{{{_TENSOR}}}".encode("utf-16"),
    "UTF-32": f"{{{_TENSOR}}}".encode("utf-32-le"),
    "Latin-1": f"{{{_TENSOR}}}".replace("a", "\u00e4").encode("latin-1"),
    "metadata twice": f'{{"__metadata__": {{}}, "__metadata__": {{}}, {_TENSOR}}}',
    "metadata null": f'{{"__metadata__": null, {_TENSOR}}}',
    "metadata null and not": f'{{"__metadata__": null, "__metadata__": {{}}, {_TENSOR}}}',
    "metadata number": f'{{"__metadata__": {{"a": 1}}, {_TENSOR}}}',
    "metadata list": f'{{"__metadata__": [], {_TENSOR}}}',
    "metadata object": f'{{"__metadata__": {{"a": {{}}}}, {_TENSOR}}}',
    "metadata surrogate": f'{{"__metadata__": {{"a": "\\ud800"}}, {_TENSOR}}}',
    "metadata surrogate name": f'{{"__metadata__": {{"\\udc00": "x"}}, {_TENSOR}}}',
    "surrogate": f"{{{_TENSOR}}}".replace('"a"', '"\\ud800"'),
    "raw surrogate": f"{{{_TENSOR}}}".replace('"a"', '"\ud800"'),
    "pair": f"{{{_TENSOR}}}".replace('"a"', '"\\ud83d\\ude00"'),
    "no name": f"{{{_TENSOR}}}".replace('"a"', '""'),
    "NUL in name": f"{{{_TENSOR}}}".replace('"a"', '"\\u0000"'),
    "control character": f"{{{_TENSOR}}}".replace('"a"', '"\x01"'),
    "escape": f"{{{_TENSOR}}}".replace('"a"', '"\\x41"'),
    "field twice": f'{{{_TENSOR[:-1]}, "dtype": "F32"}}}}',
    "other field": _with(other="[1, 2.5, {}]"),
    "other field twice": f'{{{_TENSOR[:-1]}, "x": 1, "x": 1}}}}',
    "NaN": _with(other="NaN"),
    "Infinity": _with(other="-Infinity"),
    "large float": _with(other="1e999"),
    "large integer": _with(other=str(2**70)),
    "endless integer": _with(other="9" * 5000),
    "integer of 400 digits": _with(other="9" * 400),
    "fraction": _with(other="1."),
    "exponent": _with(other="1E+5"),
    "leading zero": _with(other="01"),
    "plus": _with(other="+1"),
    "depth 125": _with(other="[" * 125 + "]" * 125),
    "depth 126": _with(other="[" * 126 + "]" * 126),
    "depth 5000": _with(other="[" * 5000 + "]" * 5000),
    "as list": '{"a": ["F32", [2], [0, 8]]}',
    "as longer list": '{"a": ["F32", [2], [0, 8], 1]}',
    "as shorter list": '{"a": ["F32", [2]]}',
    "dtype as object": _with(dtype='{"F32": null}'),
    "dtype as full object": _with(dtype='{"F32": 1}'),
    "dtype number": _with(dtype="3"),
    "dtype unknown": _with(dtype='"F31"'),
    "no offsets": '{"a": {"dtype": "F32", "shape": [2]}}',
    "tensor null": '{"a": null}',
    "tensor text": '{"a": "F32"}',
    **{f"shape {value}": _with(shape=value) for value in ("null", "{}", '"2"', "[true, 2]", "[2.0]", "[2, 1]", "[-2]")},
    "shape -0": _with(shape="[-0]"),
    "dimensions": _with(shape=f"[2{', 1' * 50}]"),
    **{
        f"offsets {value}": _with(data_offsets=value)
        for value in ('"08"', "[0, 8, 8]", "[0]", "[-0, 8]", "[0, 8.0]", "{}")
    },
    "offset 2^64": _with(data_offsets=f"[0, {2**64}]"),
    "offsets exchanged": _with(data_offsets="[8, 0]"),
    "gap": _with(data_offsets="[8, 16]"),
    "empty in between": f'{{{_TENSOR}, "b": {{"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}}}',
    "empty at the end": f'{{{_TENSOR}, "b": {{"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}}}}',
}
_EMPTY = {
    "overflow after 0": f"[0, {2**63}, {2**63}]",
    "overflow before 0": f"[{2**63}, {2**63}, 0]",
    "largest": f"[{2**64 - 1}, 0]",
    "too large": f"[{2**64}, 0]",
    "bits": f"[{2**62}]",
}


@pytest.mark.parametrize("header", _HEADERS.values(), ids=_HEADERS)
def test_headers(tmp_path: Path, header: str | bytes) -> None:
    """Catches a header that one of the two implementations reads and the other does not, or reads otherwise."""
    path = _file(tmp_path / "x.safetensors", header)
    assert _ours(path) == _reference(path)


@pytest.mark.parametrize(
    "first", [_TENSOR, '"a": 0', '"a": {"shape": [-0.0]}', '"__metadata__": {"a": 18446744073709551616, "a": "pt"}']
)
def test_a_name_twice_is_refused(tmp_path: Path, first: str) -> None:
    """Catches a first entry that nobody checks, though the reference does, because a second one takes its place."""
    path = _file(tmp_path / "x.safetensors", f"{{{first}, {_TENSOR}}}")
    with pytest.raises(CheckpointFormatError, match="'a' twice"):
        read_header(path)


@pytest.mark.parametrize("shape", _EMPTY.values(), ids=_EMPTY)
def test_sizes_beyond_64_bits(tmp_path: Path, shape: str) -> None:
    """Catches products that overflow in the reference implementation taken for sizes."""
    path = _file(tmp_path / "x.safetensors", _with(shape=shape, data_offsets="[0, 0]"), b"")
    assert _ours(path) == _reference(path)


def test_dtypes(tmp_path: Path) -> None:
    """Catches a dtype that is not known, or has another size."""
    names = [*DTYPES, *_UNSUPPORTED, "C128", "U4", "f32", "", "F8"]
    for name in names:
        for size in range(0, 36, 1):
            header = _with(dtype=json.dumps(name), shape="[4]", data_offsets=f"[0, {size}]")
            path = _file(tmp_path / "x.safetensors", header, bytes(size))
            assert _ours(path) == (None if name in _UNSUPPORTED else _reference(path)), (name, size)


@pytest.mark.parametrize("batch", range(4))
def test_damaged_headers(tmp_path: Path, batch: int) -> None:
    """Catches differences that nobody has thought of."""
    header = '{"__metadata__": {"format": "pt"}, "b": {"dtype": "F16", "shape": [2, 2], "data_offsets": [8, 16]}, %s}'
    pieces = ['"', "{", "}", "[", "]", ",", ":", "null", "true", "1", "-", "e", ".", "0", " ", "\\u", "NaN", '"a": 1,']
    for case in range(batch * 500, batch * 500 + 500):
        rng = random.Random(case)
        text = header % _TENSOR
        for _ in range(rng.choice([1, 1, 2, 3])):
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice(pieces) + text[place + rng.choice([0, 1, 1, 5]) :]
        path = _file(tmp_path / "x.safetensors", text, bytes(16))
        assert _ours(path) == _reference(path), text
