"""torch's distributed checkpoints, read as data: which tensors there are, and where in which file their chunks lie.

    .metadata       a pickle: shape, dtype and chunks of each tensor, and the place of each chunk and each object
    __0_0.distcp    records one after the other, without a header; each is a complete file of torch.save

Nothing in them is imported or called (see ``unpickle``). Every record's own pickle is judged too, as whoever loads the
checkpoint elsewhere would run all of them.

Source: ``metadata.py``, ``filesystem.py`` and ``planner.py`` of ``torch.distributed.checkpoint`` in torch 2.13.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from hf_megatron.checkpoint.budgets import (
    INDEX_FACTOR,
    MAX_DIMENSIONS,
    MAX_FILES,
    MAX_INTEGER_BITS,
    MAX_PICKLE_BYTES,
    MAX_TENSORS,
    BudgetError,
    require_within,
)
from hf_megatron.checkpoint.lazy import LazyTensor, Piece
from hf_megatron.checkpoint.regular_file import open_regular
from hf_megatron.checkpoint.safetensors_header import DTYPES
from hf_megatron.checkpoint.torch_file import StoredArray, open_torch_file
from hf_megatron.checkpoint.unpickle import Call, Global, Key, Unpickled, UnpickleError, globals_in, read_pickle
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, shown
from hf_megatron.partition import Box
from hf_megatron.partition.tiling import tiling_error

METADATA = ".metadata"

_PACKAGE = "torch.distributed.checkpoint"
_PLACE = Global(f"{_PACKAGE}.filesystem", "_StorageInfo")
_INDEX = Global(f"{_PACKAGE}.metadata", "MetadataIndex")
_TENSOR = Global(f"{_PACKAGE}.metadata", "TensorStorageMetadata")
_OBJECT = Global(f"{_PACKAGE}.metadata", "BytesStorageMetadata")
_SIZE = Global("torch", "Size")
_CODES = {Global("torch", name): code for code, (_, name) in DTYPES.items()}
_OTHER_DTYPES = ("complex64", "complex128", "quint8", "qint8", "qint32", "float8_e4m3fn", "float8_e5m2")
METADATA_GLOBALS = (
    globals_in("torch", "Size", *_OTHER_DTYPES)
    | _CODES.keys()
    | globals_in("torch.serialization", "_get_layout")
    | {_PLACE, _INDEX, _TENSOR, _OBJECT}
    | globals_in(
        f"{_PACKAGE}.metadata",
        *("ChunkStorageMetadata", "Metadata", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    )
    | globals_in("pathlib", "PosixPath")
    | globals_in("pathlib._local", "PosixPath")
    | globals_in("collections", "OrderedDict")
)
"""All that a ``.metadata`` needs: torch's own classes, without methods that run anything, and values."""
_DATA_FILE = re.compile(r"__\d{1,9}_\d{1,9}\.distcp", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Record:
    """A complete file of ``torch.save`` in a larger file: its first byte there, and its length."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and the record that holds it."""

    box: Box
    record: Record


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What ``.metadata`` says of a tensor: its whole shape, and chunks that tile it.

    The dtype is in safetensors' spelling (``"BF16"``), or is torch's name for one that safetensors has not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Index:
    """What a distributed checkpoint holds, by the names in its ``.metadata``."""

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Record]
    fields: frozenset[str]  # of the metadata itself, which differ between the versions of whoever wrote it
    names: tuple[Global, ...]  # all that the pickle refers to

    @property
    def records(self) -> list[Record]:
        """All records, in the order of the files."""
        chunks = (chunk.record for stored in self.tensors.values() for chunk in stored.chunks)
        return sorted([*chunks, *self.objects.values()])


def read_metadata(
    path: Path, allowed: Collection[Global] = METADATA_GLOBALS, *, factor: int = INDEX_FACTOR, remedy: str = ""
) -> tuple[Unpickled, bytes]:
    """The pickle ``.metadata`` as data, and its bytes; it names no files but those beside it, which are there.

    It may be ``factor`` times as large as other pickles. ``remedy`` follows what is wrong with it.

    Raises:
        CheckpointFormatError: It is damaged, beyond a limit, or names something that is not ``allowed``.
        CheckpointIncompleteError: A file that it names is missing.
    """
    try:
        with open_regular(path) as file:
            data = file.read(factor * MAX_PICKLE_BYTES + 1)
        require_within(factor * MAX_PICKLE_BYTES, len(data), "bytes at least")
        stream = io.BytesIO(data)
        read = read_pickle(stream, factor=factor)
        if stream.read(1):
            raise UnpickleError("it goes on behind its pickle")
    except (UnpickleError, BudgetError) as error:
        raise CheckpointFormatError(f"{path} cannot be read: {error}.") from None
    if refused := read.refused(allowed):
        raise CheckpointFormatError(
            f"{path} is refused: its pickle asks for {', '.join(map(shown, refused[:20]))}, which could run any code "
            f"and which no checkpoint's metadata needs. Nothing of it was run.{remedy}"
        )
    names = {_file_name(path, call) for call in read.calls if call.function == _PLACE}
    if len(names) > MAX_FILES:
        raise CheckpointFormatError(f"{path} names {len(names):,} files, and the limit is {MAX_FILES:,}.")
    for name in names:
        if not (path.parent / name).exists():
            raise CheckpointIncompleteError(f"{path.parent / name} is missing.{remedy}")
        open_regular(path.parent / name).close()
    return read, data


def read_index(directory: Path, allowed: Collection[Global] = METADATA_GLOBALS) -> Index:
    """What a distributed checkpoint holds; nothing but ``.metadata`` is read.

    Raises:
        CheckpointFormatError: As for :func:`read_metadata`; or a tensor's chunks do not tile it, or records overlap.
        CheckpointIncompleteError: A file, a chunk, or the end of a file is missing.
    """
    path = directory / METADATA
    read, _ = read_metadata(path, allowed)
    try:
        state = _state(read.value)
        stored = state["state_dict_metadata"]
        require_within(MAX_TENSORS, len(stored), "tensors and objects")
        places = _places(path, state["storage_data"])
        tensors = {
            _text(name): _tensor(name, value, places) for name, value in stored.items() if value.function == _TENSOR
        }
        objects = {_text(name): places[name, ()] for name, value in stored.items() if value.function == _OBJECT}
    except BudgetError as error:
        raise CheckpointFormatError(f"{path} is refused: {error}.") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, (CheckpointFormatError, CheckpointIncompleteError)):
            raise type(error)(f"{path}: {error}") from None
        raise CheckpointFormatError(f"{path} is not the index of a distributed checkpoint, or damaged.") from error
    return Index(tensors, objects, frozenset(map(_text, state)), read.names)


def open_tensor(stored: StoredTensor, allowed: Collection[Global]) -> LazyTensor:
    """A tensor of the index, after reading the headers of its records; they hold exactly what the index says."""
    if stored.dtype not in DTYPES:
        raise CheckpointFormatError(f"{shown(stored.name)} is of type {stored.dtype}, which is not supported.")
    pieces = []
    for chunk in stored.chunks:
        content = open_record(chunk.record, allowed)
        if not isinstance(content, StoredArray) or (content.dtype, content.shape) != (stored.dtype, chunk.box.shape):
            found = "no tensor"
            if isinstance(content, StoredArray):
                found = f"{DTYPES[content.dtype][1]} {list(content.shape)}"
            raise CheckpointFormatError(
                f"{chunk.record.path} is damaged: at byte {chunk.record.start} is {found}, where {METADATA} has a "
                f"chunk of {stored.name}, {DTYPES[stored.dtype][1]} {list(chunk.box.shape)}."
            )
        (piece,) = content.lazy(stored.name).pieces
        pieces.append(Piece(piece.path, chunk.box, piece.data_start, piece.data_stop, piece.strides, piece.identity))
    return LazyTensor(stored.name, stored.dtype, stored.shape, tuple(pieces))


def open_record(record: Record, allowed: Collection[Global]) -> Any:
    """The object of a record, with a ``StoredArray`` in place of each tensor; raises as ``open_torch_file`` does."""
    return open_torch_file(record.path, allowed, section=(record.start, record.length))


def _places(path: Path, storage_data: Mapping[Any, Call]) -> dict[tuple[str, tuple[int, ...]], Record]:
    """The records by tensor and offset of the chunk, or by object and an empty offset."""
    result: dict[tuple[str, tuple[int, ...]], Record] = {}
    sizes: dict[Path, int] = {}
    for key, place in storage_data.items():
        index, where = _state(key.value if isinstance(key, Key) else None, _INDEX), _state(place, _PLACE)
        name = _text(index["fqn"])
        offset = index.get("offset")
        wanted = name, () if offset is None else _numbers(offset)
        record = Record(path.parent / _file_name(path, place), *_numbers((where["offset"], where["length"])))
        if wanted in result:
            raise CheckpointFormatError(f"it has two places for the chunk of {shown(name)} at {list(wanted[1])}.")
        if record.path not in sizes:
            sizes[record.path] = record.path.stat().st_size
        if record.start + record.length > sizes[record.path]:
            raise CheckpointIncompleteError(
                f"{record.path} is truncated: it has {sizes[record.path]:,} bytes, and {shown(name)} lies in bytes "
                f"{record.start:,} to {record.start + record.length:,}."
            )
        result[wanted] = record
    for one, other in pairwise(sorted(set(result.values()))):
        if one.path == other.path and one.start + one.length > other.start:
            raise CheckpointFormatError(f"records overlap in {one.path} at byte {other.start:,}.")
    if len(set(result.values())) < len(result):
        raise CheckpointFormatError("several chunks or objects share one record.")
    return result


def _tensor(name: str, call: Call, places: Mapping[tuple[str, tuple[int, ...]], Record]) -> StoredTensor:
    state = _state(call, _TENSOR)
    properties = state["properties"].state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    shape = _numbers(state["size"])
    if prod(shape) >= 1 << MAX_INTEGER_BITS - 1:
        raise BudgetError(f"{shown(name)} of shape {list(shape)} has more elements than {MAX_INTEGER_BITS} bits count")
    boxes = [Box(_numbers(_state(c)["offsets"]), _numbers(_state(c)["sizes"])) for c in state["chunks"]]
    if error := tiling_error(shape, boxes):
        kind_of = CheckpointIncompleteError if "incomplete" in error else CheckpointFormatError
        raise kind_of(f"{shown(name)} {error}.")
    lacking = [box for box in boxes if box.numel and (name, box.offset) not in places]
    if lacking:
        raise CheckpointIncompleteError(f"nothing says where the chunk of {shown(name)} at {lacking[0].offset} lies.")
    chunks = tuple(Chunk(box, places[name, box.offset]) for box in boxes if box.numel)
    return StoredTensor(name, _CODES.get(dtype, dtype.name), shape, chunks)


def _state(value: Any, function: Global | None = None) -> dict[str, Any]:
    """The attributes of an instance; TypeError if it is none, or of another class than ``function``."""
    if not isinstance(value, Call) or not isinstance(value.state, dict) or function not in (None, value.function):
        raise TypeError("no instance of a class of the index")
    return value.state


def _text(value: Any) -> str:
    """A name; the text of anything else may be endless, of lists that hold each other."""
    if not isinstance(value, str):
        raise TypeError("no name")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    """A shape, or another short sequence of numbers that are not negative."""
    if isinstance(value, Call) and value.function == _SIZE and len(value.arguments) == 1:
        (value,) = value.arguments
    if not isinstance(value, (tuple, list)) or not all(type(number) is int and number >= 0 for number in value):
        raise TypeError("no sizes")
    require_within(MAX_DIMENSIONS, len(value), "dimensions in a tensor")
    return tuple(value)


def _file_name(path: Path, call: Call) -> str:
    """The file that a chunk lies in; CheckpointFormatError unless it is a data file of the same directory."""
    state = call.state if isinstance(call.state, dict) else {}
    name = state.get("relative_path")
    if not isinstance(name, str) or _DATA_FILE.fullmatch(name) is None:
        raise CheckpointFormatError(
            f"{path} is refused: it places a tensor in {shown(name)}, which is no .distcp file beside it."
        )
    if state.get("transform_descriptors"):
        raise CheckpointFormatError(f"{path} is refused: {name} is compressed or otherwise transformed.")
    return name
