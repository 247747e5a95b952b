from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_megatron.checkpoint import read_header
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5)}, path, metadata={"format": "pt"})
    return path


def test_metadata_is_no_tensor(file: Path) -> None:
    """Catches ``__metadata__`` listed among the tensors."""
    header = read_header(file)
    assert set(header.tensors) == {"a", "b"}
    assert header.metadata == {"format": "pt"}


def test_a_file_of_another_length_is_refused(file: Path) -> None:
    """Catches a truncated download that opens, and then gives zeros or garbage, and two files run together."""
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for size in (0, 5, 8, 8 + length // 2, 8 + length, len(whole) - 40, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointIncompleteError, match=r"truncated.*\b" + str(size)):
            read_header(file)
    file.write_bytes(whole * 2)
    with pytest.raises(CheckpointIncompleteError, match="too long"):
        read_header(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (["not", "an", "object"], "not a safetensors file"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
        ({"x": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, "dtype 'F99'"),
        ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "does not fill bytes 0 to 8"),
        ({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}, "are not sizes"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "are not sizes"),
        ({"x": "y"}, "not a safetensors file"),
        # Nested so deep that the JSON parser ends in a RecursionError.
        (b"[" * 200_000, "not a safetensors file"),
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, header: object, message: str) -> None:
    """Catches a header that makes a later read leave the tensor's own bytes, and raw KeyErrors for users."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(CheckpointFormatError, match=message):
        read_header(path)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    """Catches an attempt to allocate the 2e18 bytes that the first bytes of a text file stand for."""
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointFormatError, match="Git LFS"):
        read_header(path)
