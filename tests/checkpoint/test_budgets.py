"""Each limit of ``budgets``: what is at it is read, what is one beyond it is refused, with the limit and the number."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from hf_megatron import MegatronGPT2Config
from hf_megatron.architectures import GPT2
from hf_megatron.checkpoint import budgets, open_checkpoint, open_files, read_header, read_json
from hf_megatron.checkpoint.budgets import BudgetError
from hf_megatron.checkpoint.distributed import read_index
from hf_megatron.checkpoint.torch_file import open_torch_file
from hf_megatron.checkpoint.unpickle import read_pickle
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, shown
from tests.checkpoint.hostile import entries, named, saved, storage_id, tensor, with_pickle, zipped

_SMALL = 50


def _pickle(data: bytes) -> None:
    read_pickle(io.BytesIO(data))


def _json(text: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        (path / "x.json").write_text(text)
        read_json(path / "x.json")

    return read


def _header(path: Path, **tensors: list[int]) -> None:
    entries = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
    raw = json.dumps(entries).encode()
    (path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    read_header(path / "x.safetensors")


def _archive(path: Path, count: int) -> None:
    content = entries(saved(path / "x.bin"))
    open_torch_file(zipped(path / "y.bin", [*content, *((f"x/more{n}", b"") for n in range(count - len(content)))]))


def _headers(path: Path, size: int) -> None:
    """Two files whose headers have so many bytes together."""
    files = [path / "0.safetensors", path / "1.safetensors"]
    for file, length in zip(files, (size // 2, size - size // 2), strict=True):
        file.write_bytes(struct.pack("<Q", length) + b"{}".ljust(length))
    open_files(files)


def _shards(path: Path, count: int, num_files: int = 2) -> None:
    """A tp directory of so many tensors, a piece each, none of which is of the model."""
    (path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    for number in range(num_files):
        names = [str(n) for n in range(count) if n % num_files == number]
        sharding = json.dumps({name: {"saved_offsets": [0]} for name in names})
        entries: dict[str, Any] = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
        raw = json.dumps({"__metadata__": {"DCP_SHARDING_INFO": sharding}, **entries}).encode()
        file = path / f"shard-{number + 1:05d}-model-00001-of-00001.safetensors"
        file.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with suppress(CheckpointIncompleteError):
        open_checkpoint(path)


def _nested(path: Path, depth: int) -> None:
    value: Any = {}
    for _ in range(depth):
        value = {"x": value}
    open_torch_file(with_pickle(path / "x.bin", pickle.dumps(value, 2)))


def _dimensions(path: Path, count: int) -> None:
    sides = (1,) * count
    open_torch_file(with_pickle(path / "x.bin", named(x=tensor(sides, sides, storage_id(6)))))


def _index(path: Path, count: int) -> None:
    (path / "config.json").write_text("{}")
    for number in range(count):
        (path / f"{number}.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    names = {str(number): f"{number}.safetensors" for number in range(count)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    try:
        open_checkpoint(path)
    except CheckpointFormatError:
        raise
    except ValueError as error:
        assert "tensors that their files do not hold" in str(error)  # noqa: PT017 (only a limit is of interest)


def _distributed(path: Path, count: int) -> None:
    """A distributed checkpoint of so many objects."""
    metadata = dcp.Metadata({}, None, {})
    assert metadata.storage_data is not None
    for number in range(count):
        metadata.state_dict_metadata[str(number)] = dcp.BytesStorageMetadata()
        metadata.storage_data[dcp.MetadataIndex(str(number))] = _StorageInfo("__0_0.distcp", number, 1)
    (path / "__0_0.distcp").write_bytes(bytes(count))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    read_index(path)


# By name: the limit for the test (None for the real one) and what reads so many.
_LIMITS: dict[str, tuple[int | None, Callable[[Path, int], object]]] = {
    "MAX_PICKLE_BYTES": (_SMALL, lambda path, n: _pickle(b"X" + struct.pack("<I", n - 6) + b"x" * (n - 6) + b".")),
    "MAX_PICKLE_OBJECTS": (_SMALL, lambda path, n: _pickle(b"N0" * (n - 1) + b"N.")),
    "MAX_PICKLE_INSTRUCTIONS": (_SMALL, lambda path, n: _pickle(b"N" + b"\x94" * (n - 2) + b".")),
    "MAX_INTEGER_BITS": (None, lambda path, n: _pickle(pickle.dumps(2**n - 1, 2))),
    "MAX_KEY_LENGTH": (None, lambda path, n: _pickle(pickle.dumps({"x" * n: 1}, 2))),
    "MAX_NAME_LENGTH": (None, lambda path, n: _pickle(b"c" + b"x" * n + b"\ny\n.")),
    "MAX_NESTING": (None, _nested),
    "MAX_DIMENSIONS": (
        None,
        lambda path, n: open_torch_file(
            with_pickle(path / "x.bin", named(x=tensor((1,) * n, (1,) * n, storage_id(6))))
        ),
    ),
    "MAX_ZIP_ENTRIES": (_SMALL, _archive),
    "MAX_JSON_BYTES": (None, lambda path, n: _json(json.dumps({"x": "y" * (n - 9)}))(path)),
    "MAX_JSON_NESTING": (None, lambda path, n: _json('{"x":' + "[" * (n - 1) + "]" * (n - 1) + "}")(path)),
    "MAX_JSON_VALUES": (_SMALL, lambda path, n: _json('{"x":[1' + ",1" * (n - 2) + "]}")(path)),
    "MAX_TENSORS": (_SMALL, lambda path, n: _header(path, **{str(number): [0] for number in range(n)})),
    "MAX_FILES": (_SMALL, _index),
    "MAX_SAFETENSORS_HEADERS_BYTES": (_SMALL, _headers),
    "MAX_PIECES": (_SMALL, _shards),
}
_ELSEWHERE = {
    "MAX_INTEGER_BITS": lambda path, n: _json(f'{{"x": {2**n - 1}}}')(path),
    "MAX_KEY_LENGTH": lambda path, n: _header(path, **{"x" * n: [0]}),
    "MAX_TENSORS": _distributed,
    "MAX_DIMENSIONS": lambda path, n: _header(path, x=[0] * n),
}
_CASES = [
    *((name, *case) for name, case in _LIMITS.items()),
    *((name, _LIMITS[name][0], read) for name, read in _ELSEWHERE.items()),
    ("MAX_TENSORS", _SMALL, _shards),
    ("MAX_FILES", _SMALL, lambda path, n: _shards(path, n, num_files=n)),
]


@pytest.mark.parametrize(("name", "limit", "read"), _CASES, ids=[f"{name}-{n}" for n, (name, *_) in enumerate(_CASES)])
def test_at_the_limit_and_one_beyond(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    limit: int | None,
    read: Callable[[Path, int], object],
) -> None:
    """Catches a limit that is not looked at, is off by one, or is refused without saying what it is."""
    if limit is None:
        limit = int(getattr(budgets, name))
    for module in (
        "unpickle",
        "torch_file",
        "zip_directory",
        "directory",
        "safetensors_header",
        "json_text",
        "distributed",
        "sharded",
    ):
        monkeypatch.setattr(f"hf_megatron.checkpoint.{module}.{name}", limit, raising=False)
    (tmp_path / "at").mkdir()
    (tmp_path / "beyond").mkdir()
    read(tmp_path / "at", limit)
    with pytest.raises((BudgetError, CheckpointFormatError)) as caught:
        read(tmp_path / "beyond", limit + 1)
    assert f"{limit:,}" in str(caught.value) or str(limit) in str(caught.value)


@pytest.mark.parametrize("number", [-(2**63), -(2**63) - 1])
def test_the_smallest_integer(tmp_path: Path, number: int) -> None:
    """Catches a limit for positive integers only."""
    if number == -(2**63):
        _pickle(pickle.dumps(number, 2))
        _json(f"[{number}]".replace("[", '{"x":').replace("]", "}"))(tmp_path)
        return
    with pytest.raises(BudgetError):
        _pickle(pickle.dumps(number, 2))
    with pytest.raises(CheckpointFormatError, match="the limit is 64 bits"):
        _json(f'{{"x": {number}}}')(tmp_path)


def test_the_papers_largest_model_on_its_512_ranks_is_within_the_limits() -> None:
    """Catches limits that refuse real checkpoints: each rank has a piece of every tensor if all of them are cut."""
    config = MegatronGPT2Config.from_preset("gpt2-8.3b").to_dict()
    tensors = GPT2.tensors(config, GPT2.classes[0])
    end = 2**40  # more digits than any offset has
    entries: dict[str, Any] = {
        name: {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end]} for name, tensor in tensors.items()
    }
    sharding = json.dumps({name: {"saved_offsets": tensor.shape} for name, tensor in tensors.items()})
    header = json.dumps({"__metadata__": {"DCP_SHARDING_INFO": sharding}, **entries})
    assert 512 * len(tensors) <= budgets.MAX_PIECES
    assert 512 * len(header) <= budgets.MAX_SAFETENSORS_HEADERS_BYTES


def test_a_header_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a length that is read before it is compared."""
    monkeypatch.setattr("hf_megatron.checkpoint.safetensors_header.MAX_SAFETENSORS_HEADER_BYTES", _SMALL)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", _SMALL) + b"{}".ljust(_SMALL))
    assert read_header(path).tensors == {}
    path.write_bytes(struct.pack("<Q", _SMALL + 1) + b"{}".ljust(_SMALL + 1))
    with pytest.raises(CheckpointFormatError, match="would be 51 bytes long, and the limit is 50"):
        read_header(path)


def test_a_directory_of_an_archive_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a directory that is read before it is measured."""
    path = zipped(tmp_path / "y.bin", entries(saved(tmp_path / "x.bin")))
    (size,) = struct.unpack("<L", path.read_bytes()[-10:-6])
    monkeypatch.setattr("hf_megatron.checkpoint.zip_directory.MAX_ZIP_DIRECTORY_BYTES", size)
    open_torch_file(path)
    monkeypatch.setattr("hf_megatron.checkpoint.zip_directory.MAX_ZIP_DIRECTORY_BYTES", size - 1)
    with pytest.raises(CheckpointFormatError, match=f"it has {size} bytes in its directory, and"):
        open_torch_file(path)


def test_a_pickle_of_several_times_the_limits() -> None:
    """Catches metadata of large runs refused for their size."""
    data = b"N0" * budgets.MAX_PICKLE_OBJECTS + b"N."
    with pytest.raises(BudgetError, match="more than 1,000,000 objects"):
        _pickle(data)
    assert read_pickle(io.BytesIO(data), factor=2).value is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\x1b[2J\n\ud800", "'a\\x1b[2J\\n\\ud800'"),
        ("x" * 200, "'" + "x" * 80 + "'..."),
        (2**64, "an integer of 65 bits"),
        (10**5000, "an integer of 16610 bits"),
        ([1, "a", None, 2.5, True], "[1, 'a', None, 2.5, True]"),
        ([[1]], "a list"),
        ([1] * 9, "a list"),
        ({"a": 1}, "a dict"),
        (b"x" * 10**6, "a bytes"),
    ],
    ids=range(9),
)
def test_values_in_messages(value: object, text: str) -> None:
    """Catches a message as long as a file, one that never ends, and one that moves the cursor."""
    assert shown(value) == text
