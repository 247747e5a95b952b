from __future__ import annotations

import io
import itertools
import operator
import os
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_megatron.checkpoint import DTYPES, LazyTensor, open_checkpoint, open_files, torch_dtype
from hf_megatron.checkpoint import gather as gather_module
from hf_megatron.checkpoint.gather import FileReader, gather
from hf_megatron.errors import CheckpointIncompleteError
from hf_megatron.partition import Box
from tests.checkpoint.directories import model_tensors, write_hub, write_tp

SHAPE = (5, 3, 4)
# How much may be read at once, and how much of that for nothing: all, a little, nothing that is not wanted.
_BOUNDS = [(2**20, 8192), (64, 16), (200, 0)]


def all_boxes(shape: tuple[int, ...]) -> Iterator[Box]:
    """Every box of a tensor of this shape, the empty ones included."""
    ranges = [[(a, b) for a in range(size + 1) for b in range(a, size + 1)] for size in shape]
    for ends in itertools.product(*ranges):
        yield Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


def stored_in(path: Path, tensor: torch.Tensor, boxes: list[Box]) -> LazyTensor:
    """``tensor`` in pieces, one per box, all in one file."""
    save_file({str(i): tensor[box.slices].contiguous() for i, box in enumerate(boxes)}, path)
    stored = open_files([path])
    pieces = tuple(replace(stored[str(i)].pieces[0], box=box) for i, box in enumerate(boxes))
    return LazyTensor("x", stored["0"].dtype, tuple(tensor.shape), pieces)


@pytest.mark.parametrize(
    "boxes",
    [
        [Box.whole(SHAPE)],
        [Box((0, 0, 0), (3, 3, 4)), Box((3, 0, 0), (2, 3, 4))],
        [Box((0, 0, 0), (5, 3, 2)), Box((0, 0, 2), (5, 3, 2))],
        [Box((a, 0, c), (rows, 3, columns)) for a, rows in ((0, 3), (3, 2)) for c, columns in ((0, 1), (1, 3))],
    ],
    ids=["whole", "rows", "columns", "grid"],
)
@pytest.mark.parametrize(("scratch", "gap"), _BOUNDS)
def test_every_slice_is_what_torch_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boxes: list[Box], scratch: int, gap: int
) -> None:
    """Catches wrong byte runs: a row stride of the piece where the full tensor's is meant, or an off-by-one."""
    monkeypatch.setattr(gather_module, "SCRATCH_BYTES", scratch)
    monkeypatch.setattr(gather_module, "_MAX_GAP_BYTES", gap)
    tensor = torch.arange(60, dtype=torch.int64).view(SHAPE)
    lazy = stored_in(tmp_path / "x.safetensors", tensor, boxes)
    for box in all_boxes(SHAPE):
        read = lazy.read(box)
        assert torch.equal(read, tensor[box.slices]), box
        assert read.is_contiguous()
    assert torch.equal(lazy.read(), tensor)


@pytest.mark.parametrize(("scratch", "gap"), _BOUNDS)
def test_every_layout_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: int, gap: int) -> None:
    """Catches strides of two dimensions exchanged, a block read twice or not at all, and memory beside the target
    written to: random layouts of file and memory, as numpy reads them."""
    monkeypatch.setattr(gather_module, "SCRATCH_BYTES", scratch)
    monkeypatch.setattr(gather_module, "_MAX_GAP_BYTES", gap)
    monkeypatch.setattr(gather_module, "_TILE_ROWS", 3)
    chance = random.Random(0)
    data = chance.randbytes(2**17)
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb", buffering=0) as opened:
        file = FileReader(path, opened)
        for _ in range(500):
            item = chance.choice([1, 2, 4, 8])
            shape = [chance.randint(1, 5) for _ in range(chance.randint(0, 4))]
            strides, step = [0] * len(shape), item
            for dim in chance.sample(range(len(shape)), len(shape)):
                strides[dim], step = step, step * (shape[dim] + chance.choice([0, 0, 2]))
            start = chance.randint(0, 50)
            around: Any = np.zeros(
                [size + chance.choice([0, 0, 1]) for size in shape], f"u{item}", order=chance.choice(["C", "F"])
            )
            target = around[(*(slice(0, size) for size in shape), ...)]
            gather(file, start, strides, target)
            expected = np.ndarray(shape, f"u{item}", data, offset=start, strides=strides)
            assert np.array_equal(target, expected), (item, shape, strides)
            assert around.sum(dtype=object) == expected.sum(dtype=object)


@pytest.mark.parametrize("boxes", [[Box.whole((6, 4))], [Box((0, 0), (6, 1)), Box((0, 1), (6, 3))]])
def test_views_move_no_bytes_and_read_the_right_ones(tmp_path: Path, boxes: list[Box]) -> None:
    """Catches a transposed or narrowed tensor that reads its neighbour's rows, whole or in pieces."""
    tensor = torch.arange(24, dtype=torch.int32).view(6, 4)
    lazy = stored_in(tmp_path / "x.safetensors", tensor, boxes)
    assert torch.equal(lazy.transposed().read(), tensor.t())
    assert torch.equal(lazy.transposed().transposed().narrowed(0, 2, 5).read(), tensor[2:5])
    assert torch.equal(lazy.transposed().narrowed(0, 1, 3).narrowed(1, 2, 6).read(), tensor.t()[1:3, 2:6])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: str) -> None:
    """Catches bfloat16 and the 8-bit floats, which numpy does not know, read as something else or not at all."""
    bits = torch.randint(0, 2 if dtype == "BOOL" else 256, (6, 4, 8), dtype=torch.uint8)
    tensor = bits.view(torch_dtype(dtype))
    save_file({"x": tensor, "scalar": tensor[0, 0, 0].clone()}, tmp_path / "x.safetensors")
    tensors = open_files([tmp_path / "x.safetensors"])
    part = tensors["x"][2:5, 1:3]
    assert part.dtype == tensor.dtype
    assert torch.equal(part.view(torch.uint8), tensor[2:5, 1:3].contiguous().view(torch.uint8))
    assert tensors["scalar"].read().shape == ()
    assert tensors["x"].nbytes == tensor.nbytes


def lazy_of(directory: Path, tensor: torch.Tensor) -> LazyTensor:
    """The tensor, stored whole."""
    save_file({"x": tensor}, directory / "x.safetensors")
    return open_files([directory / "x.safetensors"])["x"]


class CountingFile(io.FileIO):
    """A raw file that counts the bytes that are read from it."""

    num_bytes = 0
    names: set[str]

    def readinto(self, buffer: Any, /) -> int | None:
        count = super().readinto(buffer)
        CountingFile.num_bytes += count or 0
        CountingFile.names.add(Path(os.fsdecode(str(self.name))).name)
        return count


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[CountingFile]:
    monkeypatch.setattr(io, "FileIO", CountingFile)
    CountingFile.num_bytes, CountingFile.names = 0, set()
    return CountingFile


@pytest.mark.parametrize(
    ("index", "num_runs"), [((slice(16, 24),), 1), ((slice(None), slice(8192, 16384)), 64)], ids=["rows", "columns"]
)
def test_a_slice_reads_its_own_bytes(
    tmp_path: Path, counting: type[CountingFile], index: tuple[slice, ...], num_runs: int
) -> None:
    """Catches a slice cut out of the whole tensor after reading all of it: N ranks would read N times the file."""
    save_file({"x": torch.zeros(64, 16384), "y": torch.zeros(64, 1024)}, tmp_path / "x.safetensors")
    tensor = open_files([tmp_path / "x.safetensors"])["x"]
    counting.num_bytes = 0
    part = tensor[index]
    assert part.nbytes <= counting.num_bytes <= part.nbytes + 8192 * num_runs
    assert counting.num_bytes < 0.7 * tensor.nbytes


def test_a_slice_opens_only_the_files_it_lies_in(tmp_path: Path, counting: type[CountingFile]) -> None:
    """Catches a reader of ``tp`` directories that merges all pieces before cutting."""
    write_tp(tmp_path, model_tensors(), tp_size=4)
    embedding = open_checkpoint(tmp_path).tensors["transformer.wte.weight"]
    counting.names = set()
    embedding[34:60]  # 33 rows per file
    assert counting.names == {"shard-00002-model-00001-of-00001.safetensors"}


def test_what_is_read_outlives_the_file(tmp_path: Path) -> None:
    """Catches tensors that are views of a memory map: they change, or crash the process, when the file does."""
    tensors = model_tensors()
    lazy = open_checkpoint(write_hub(tmp_path, tensors)).tensors
    read = {name: tensor[1:, ...] for name, tensor in lazy.items()}
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    for name, tensor in read.items():
        assert torch.equal(tensor, tensors[name][1:])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_slice_of_a_pickle_is_a_copy(tmp_path: Path) -> None:
    """Catches a one-row slice that keeps, and writes into, the storage of the whole tensor."""
    torch.save({"x": torch.arange(12.0).view(3, 4).t()}, tmp_path / "pytorch_model.bin")
    tensor = open_files([tmp_path / "pytorch_model.bin"])["x"]
    row = tensor[2:3]
    row.zero_()
    assert torch.equal(tensor.read(), torch.arange(12.0).view(3, 4).t())
    assert tensor.read().is_contiguous()
    assert row.untyped_storage().nbytes() == row.nbytes


def test_threads_may_read_one_tensor(tmp_path: Path) -> None:
    """Catches a shared file position: the loader reads with four threads."""
    tensor = torch.arange(64 * 512.0).view(64, 512)
    lazy = lazy_of(tmp_path, tensor)
    with ThreadPoolExecutor(8) as threads:
        columns = threads.map(lambda i: lazy[:, i : i + 3], range(300))
        for i, part in enumerate(columns):
            assert torch.equal(part, tensor[:, i : i + 3])


def test_a_lazy_tensor_travels_to_another_process(tmp_path: Path) -> None:
    """Catches an open file handle kept in the tensor: it cannot be pickled, and thousands of them exhaust a limit."""
    lazy = open_checkpoint(write_hub(tmp_path, model_tensors())).tensors["transformer.wte.weight"]
    assert torch.equal(pickle.loads(pickle.dumps(lazy)).read(), lazy.read())


def test_speaks_the_slice_protocol_of_safetensors(tmp_path: Path) -> None:
    """Catches an index that transformers' loader uses and that means something else here."""
    tensor = torch.arange(12.0).view(3, 4)
    lazy = lazy_of(tmp_path, tensor)
    assert (lazy.get_shape(), lazy.get_dtype()) == ([3, 4], "F32")
    indices: list[Any] = [..., np.s_[1:], np.s_[1:, ...], np.s_[-2:, :-1], np.s_[0:0, 0:4], np.s_[2:1], np.s_[0:99]]
    for index in indices:
        assert torch.equal(lazy[index], tensor[index]), index


@pytest.mark.parametrize(
    ("access", "error", "told"),
    [
        # For list Python falls back to indexing and takes an IndexError for the end.
        *(
            (access, TypeError, "slices without a step")
            for access in (list, *map(operator.itemgetter, (0, np.s_[:, 1], np.s_[0:3:2], np.s_[..., :1], None)))
        ),
        (operator.itemgetter(np.s_[:, :, :]), IndexError, "fewer dimensions"),
    ],
)
def test_other_indices_are_refused(
    tmp_path: Path, access: Callable[[Any], object], error: type[Exception], told: str
) -> None:
    """Catches a step, an integer or surplus slices that are ignored, and ``list(tensor) == []``."""
    with pytest.raises(error, match=told):
        access(lazy_of(tmp_path, torch.zeros(3, 4)))


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path: Path) -> None:
    """Catches a short read that leaves the rest of the tensor uninitialised."""
    tensors = open_checkpoint(write_hub(tmp_path, model_tensors())).tensors
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointIncompleteError, match="became shorter"):
        [tensor.read() for tensor in tensors.values()]


def _write_in_place(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"x")


def _replace(file: Path) -> None:
    status = file.stat()
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(file)


@pytest.mark.parametrize("change", [_write_in_place, _replace, Path.unlink])
def test_a_file_that_changes_after_opening_is_noticed(tmp_path: Path, change: Callable[[Path], object]) -> None:
    """Catches the offsets of one file read in another: as many bytes, the right shapes, and another model's weights."""
    tensors = open_checkpoint(write_hub(tmp_path, model_tensors())).tensors
    change(tmp_path / "model.safetensors")
    for tensor in pickle.loads(pickle.dumps(tensors)).values():
        with pytest.raises(CheckpointIncompleteError, match=r"model\.safetensors was"):
            tensor.read()
