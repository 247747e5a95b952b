"""Weights that stay in their files: what is mapped and what is copied, and what happens when either side changes."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save, save_file

from hf_megatron.checkpoint import LazyTensor, open_files
from hf_megatron.checkpoint.mapping import ALIGNMENT, MappedFiles
from hf_megatron.errors import CheckpointIncompleteError
from hf_megatron.partition import Box

_TENSOR = torch.arange(24 * 8192.0).view(24, 8192)
_ROWS, _COLUMNS = Box((8, 0), (8, 8192)), Box((0, 2048), (24, 2048))


def _lazy(path: Path, padding: int = 0) -> LazyTensor:
    """The tensor in a file, ``padding`` bytes behind a multiple of 64."""
    whole = save({"x": _TENSOR})
    (length,) = struct.unpack("<Q", whole[:8])
    header = whole[8 : 8 + length].rstrip()
    header += b" " * ((padding - 8 - len(header)) % 64)
    path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
    return replace(open_files([path])["x"], mapped=MappedFiles())


def _is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("padding", "box", "stays"),
    [(0, None, True), (16, None, True), (8, None, False), (0, _ROWS, True), (8, _ROWS, False), (0, _COLUMNS, False)],
)
def test_what_lies_in_one_piece_stays_in_the_file(tmp_path: Path, padding: int, box: Box | None, stays: bool) -> None:
    """Catches a copy of what could stay, a weight at an address where products round otherwise, and a whole tensor
    held for the sake of a few columns."""
    path = tmp_path / "x.safetensors"
    part = _lazy(path, padding).read(box)
    expected = _TENSOR if box is None else _TENSOR[box.slices]
    assert torch.equal(part, expected)
    assert _is_mapped(path) == stays
    assert part.data_ptr() % ALIGNMENT == 0
    assert part.is_contiguous()
    assert part.untyped_storage().nbytes() == part.nbytes
    del part
    assert not _is_mapped(path)


def test_a_file_that_cannot_be_mapped_is_read(tmp_path: Path) -> None:
    """Catches a load that fails on a file system without mappings."""
    lazy = _lazy(tmp_path / "x.safetensors")
    with mock.patch("mmap.mmap", side_effect=OSError):
        assert torch.equal(lazy.read(), _TENSOR)
        assert torch.equal(lazy.read(_COLUMNS), _TENSOR[_COLUMNS.slices])


def test_a_weight_that_is_written_to_is_the_model_s_own(tmp_path: Path) -> None:
    """Catches training that changes the checkpoint, or another model that was loaded from the same file."""
    path = tmp_path / "x.safetensors"
    lazy = _lazy(path)
    before, first, second = path.read_bytes(), lazy.read(), replace(lazy, mapped=MappedFiles()).read()
    first.add_(1)
    assert torch.equal(first, _TENSOR + 1)
    assert torch.equal(second, _TENSOR)
    assert path.read_bytes() == before


def test_a_weight_outlives_its_file(tmp_path: Path) -> None:
    """Catches a mapped weight that changes when its file is saved anew, and a later read from the other file."""
    path = tmp_path / "x.safetensors"
    lazy = _lazy(path)
    weight = lazy.read()
    save_file({"x": -weight}, path)
    assert torch.equal(weight, _TENSOR)
    with pytest.raises(CheckpointIncompleteError, match="while it was read"):
        lazy.read()
    path.unlink()
    assert torch.equal(weight, _TENSOR)


@pytest.mark.parametrize("box", [Box.whole((24, 8192)), _COLUMNS])
def test_a_file_that_has_become_shorter_is_not_mapped(tmp_path: Path, box: Box) -> None:
    """Catches a mapping of pages that are gone, which would end the process."""
    path = tmp_path / "x.safetensors"
    lazy = _lazy(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointIncompleteError, match="became shorter"):
        lazy.read(box)
