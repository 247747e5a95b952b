"""Read ``torch.save`` files without unpickling: the object as plain data, and the file offset of each tensor.

Since torch 1.6, a file is a zip archive of uncompressed entries: ``data.pkl`` and one per storage. Before, it was five
consecutive pickles, followed by the length and bytes of each storage. This module reads only the pickles, as data (see
``unpickle``): nothing is imported or called, and names outside an explicit list are rejected.

Source: ``torch.serialization`` and ``torch._utils._rebuild_tensor_v2`` in torch 2.13.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from hf_megatron.checkpoint.lazy import LazyTensor, Piece
from hf_megatron.checkpoint.safetensors_header import itemsize
from hf_megatron.checkpoint.unpickle import Call, Global, UnpickleError, read_pickle
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError
from hf_megatron.partition import Box

STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}
_DTYPES = {f"{module}.{name}": dtype for dtype, name in STORAGES.items() for module in ("torch", "torch.cuda")}
_REBUILD_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_REBUILD_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_OTHER_STORAGES = ("ComplexFloatStorage", "ComplexDoubleStorage", "QInt8Storage", "QInt32Storage", "QUInt8Storage")
TENSOR_NAMES = frozenset(
    {
        "collections.OrderedDict",
        "torch.Size",
        "torch.storage.UntypedStorage",
        *(f"torch.{name}" for name in _OTHER_STORAGES),
        *_DTYPES,
        *_REBUILD_TENSOR,
        *_REBUILD_PARAMETER,
    }
)
"""All that a dictionary of tensors asks for."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    type: str
    numel: int
    offset: int = 0  # elements before this view of it (files of torch 0.3)

    @property
    def nbytes(self) -> int:
        return self.numel * itemsize(_DTYPES[self.type])


@dataclass(frozen=True, slots=True)
class StoredArray:
    """A tensor of a pickle: dtype in safetensors' spelling, shape, strides in elements, and the byte it starts at."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    path: Path

    def lazy(self, name: str) -> LazyTensor:
        """The same, to be read by slices under a name."""
        span = itemsize(self.dtype) * _span(self.shape, self.strides)
        piece = Piece(self.path, Box.whole(self.shape), self.start, self.start + span, self.strides)
        return LazyTensor(name, self.dtype, self.shape, (piece,))


def open_state_dict(path: Path) -> dict[str, LazyTensor]:
    """Open a file that contains only named tensors, such as ``pytorch_model.bin``; no tensor data is read.

    Raises as :func:`open_torch_file` does, and CheckpointFormatError if it holds anything else.
    """
    content = open_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointFormatError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors.")
    tensors = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, StoredArray):
            kind = value.name if isinstance(value, Global) else type(value).__name__
            raise CheckpointFormatError(
                f"{path}: {name!r} is a {kind}; only named tensors, of types that safetensors has, are expected."
            )
        tensors[name] = value.lazy(name)
    return tensors


def open_torch_file(path: Path, is_allowed: Callable[[str], bool] = TENSOR_NAMES.__contains__) -> Any:
    """Read the object of a ``torch.save`` file, with a :class:`StoredArray` in place of each tensor.

    ``is_allowed`` says whether the pickle may name a global (``module.name``), which is not looked up in any case.
    CheckpointFormatError if it is no file of ``torch.save``, or lists what else is named; CheckpointIncompleteError if
    it is truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
            file.seek(0)
            if not is_zip:
                return _open_legacy(path, file, is_allowed)
            with zipfile.ZipFile(file) as archive:
                return _open_zip(path, archive, is_allowed)
    except UnpickleError as error:
        raise CheckpointFormatError(
            f"{path} is not a file of torch.save: {error}. It may be truncated, or a Git LFS pointer that was never "
            "fetched."
        ) from None
    except (CheckpointFormatError, CheckpointIncompleteError):
        raise
    except Exception as error:
        # Damaged files make the readers raise many kinds of errors: BadZipFile, KeyError, UnicodeDecodeError, ...
        raise CheckpointIncompleteError(f"{path} cannot be read; is it truncated? {error!r}") from error


def _refuse(path: Path, names: Iterable[str], is_allowed: Callable[[str], bool]) -> None:
    if refused := sorted({name for name in names if not is_allowed(name)}):
        raise CheckpointFormatError(
            f"{path} is refused: its pickle asks for {', '.join(refused)}, and loading it elsewhere could run any "
            "code. Nothing of it was run. Get the weights as safetensors, or from a source that you trust."
        )


def _open_zip(path: Path, archive: zipfile.ZipFile, is_allowed: Callable[[str], bool]) -> Any:
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "constants.pkl" in entries:
        raise CheckpointFormatError(f"{path} is a TorchScript program, not a file of torch.save.")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise CheckpointFormatError(f"{path} was written on a big-endian machine; convert it there.")
    if entries["data.pkl"].compress_type != zipfile.ZIP_STORED:
        raise CheckpointFormatError(f"{path} is a compressed archive, not a file of torch.save.")
    read = read_pickle(io.BytesIO(archive.read(entries["data.pkl"])), _storage)
    _refuse(path, read.names, is_allowed)
    size = path.stat().st_size

    def start(storage: _Storage) -> int:
        info = entries.get(f"data/{storage.key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointIncompleteError(f"{path} lacks the data of a tensor (data/{storage.key}).")
        position = _data_start(archive, info)
        if info.file_size < storage.nbytes or position + storage.nbytes > size:
            raise CheckpointIncompleteError(
                f"{path} is truncated: data/{storage.key} has {info.file_size} bytes, {storage.nbytes} are needed."
            )
        return position

    return _with_places(path, read.value, start)


def _data_start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Offset of an entry's data in the archive: after its local header, which has its own lengths."""
    assert archive.fp is not None
    archive.fp.seek(info.header_offset)
    header = _LOCAL_HEADER.unpack(archive.fp.read(_LOCAL_HEADER.size))
    if header[0] != _ZIP_MAGIC:
        raise zipfile.BadZipFile(f"no entry at byte {info.header_offset}")
    return info.header_offset + _LOCAL_HEADER.size + int(header[-2]) + int(header[-1])


def _open_legacy(path: Path, file: BinaryIO, is_allowed: Callable[[str], bool]) -> Any:
    """A file of torch before 1.6."""
    if read_pickle(file).value != _LEGACY_MAGIC or read_pickle(file).value != _LEGACY_PROTOCOL:
        raise UnpickleError("it does not start as one")
    system = read_pickle(file).value
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise CheckpointFormatError(f"{path} was written on a big-endian machine; convert it there.")
    storages: dict[str, _Storage] = {}

    def load(persistent_id: Any) -> _Storage:
        storage = _storage(persistent_id)
        # In files of torch 0.3, each view of a storage gives the size of the whole storage.
        storages.setdefault(storage.key, replace(storage, offset=0))
        return storage

    read = read_pickle(file, load)
    _refuse(path, read.names, is_allowed)
    # The storage keys follow, then the length and bytes of each storage in that order.
    keys = read_pickle(file).value
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise CheckpointIncompleteError(f"{path} does not list the tensors that it holds.")
    position, size, starts = file.tell(), os.fstat(file.fileno()).st_size, {}
    for key in keys:
        file.seek(position)
        prefix = file.read(8)
        numel = struct.unpack("<q", prefix)[0] if len(prefix) == 8 else -1
        starts[key] = position + 8
        position += 8 + replace(storages[key], numel=numel).nbytes
        if numel < storages[key].numel or position > size:
            raise CheckpointIncompleteError(f"{path} is truncated or damaged at byte {starts[key]} of {size}.")
    return _with_places(path, read.value, lambda storage: starts[storage.key])


def _storage(persistent_id: Any) -> _Storage:
    """A storage from its persistent id: ("storage", type, key, device, number of elements, view or nothing)."""
    kind, storage_type, key, _, numel, *view = persistent_id
    offset = view[0][1] if view and view[0] is not None else 0
    if kind != "storage" or not isinstance(storage_type, Global) or not isinstance(key, str):
        raise ValueError("not a storage")
    if not all(isinstance(number, int) and number >= 0 for number in (numel, offset)):
        raise ValueError("not a size")
    return _Storage(key, storage_type.name, numel, offset)


def _with_places(path: Path, content: Any, start: Callable[[_Storage], int]) -> Any:
    """A pickle's value with its tensors, or their type if safetensors lacks it, in place of the calls for them.

    Anything that is not a container of named things is left as it is.
    """
    done: dict[int, dict[Any, Any]] = {}

    def place(value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        if isinstance(value, dict):
            # Convert shared objects only once: damaged files could otherwise expand exponentially.
            if id(value) not in done:
                done[id(value)] = {key: place(item, depth + 1) for key, item in value.items()}
            return done[id(value)]
        if isinstance(value, Call) and value.function in _REBUILD_PARAMETER and value.arguments:
            return place(value.arguments[0], depth + 1)
        if isinstance(value, Call) and value.function in _REBUILD_TENSOR and value.arguments:
            return _array(path, value.arguments, start)
        return value

    return place(content, 0)


def _array(path: Path, arguments: tuple[Any, ...], start: Callable[[_Storage], int]) -> StoredArray | Global:
    storage, offset, shape, strides, *_ = arguments
    if isinstance(storage, _Storage) and storage.type not in _DTYPES:
        return Global(storage.type)
    is_tensor = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not is_tensor or not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
        raise ValueError("not a tensor")
    if prod(shape) and offset + _span(shape, strides) > storage.numel:
        raise CheckpointIncompleteError(f"{path} holds a tensor that is larger than its data.")
    dtype = _DTYPES[storage.type]
    return StoredArray(dtype, shape, strides, start(storage) + (storage.offset + offset) * itemsize(dtype), path)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first one to the last."""
    distance = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return 1 + distance if prod(shape) else 0
