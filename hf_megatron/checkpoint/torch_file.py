"""Files of ``torch.save``: the pickled object as data, and each tensor's place in the file.

Since torch 1.6 a file is a zip archive of uncompressed entries, ``data.pkl`` and one per storage; before, it is five
pickles one after the other, then each storage's length and bytes. Of both only the pickles are read here, as data (see
``unpickle``): nothing in them is imported or called, and whatever they name beyond an explicit list is refused.

Source: ``torch.serialization`` and ``torch._utils._rebuild_tensor_v2`` in torch 2.13.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from hf_megatron.checkpoint.lazy import LazyTensor, Piece
from hf_megatron.checkpoint.safetensors_header import itemsize
from hf_megatron.checkpoint.unpickle import Call, Global, Unpickled, UnpickleError, read_pickle
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
    def dtype(self) -> str:
        """In safetensors' spelling."""
        return _DTYPES[self.type]


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
        size = itemsize(self.dtype)
        span = size * (1 + _last_element(self.shape, self.strides)) if prod(self.shape) else 0
        piece = Piece(self.path, Box.whole(self.shape), self.start, self.start + span, self.strides)
        return LazyTensor(name, self.dtype, self.shape, (piece,))


def open_state_dict(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that holds nothing but named tensors, such as ``pytorch_model.bin``; none is read.

    Raises:
        CheckpointFormatError: It holds or asks for anything else.
        CheckpointIncompleteError: It is truncated or damaged.
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
    """The object of a ``torch.save`` file, with a :class:`StoredArray` for each tensor. No storage is read.

    Args:
        path: The file.
        is_allowed: Whether the pickle may name this global (``module.name``), which is not looked up in any case.

    Raises:
        CheckpointFormatError: Not a file of ``torch.save``, or one that names anything else; all of it is listed.
        CheckpointIncompleteError: The file is truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC:
                with zipfile.ZipFile(file) as archive:
                    return _open_zip(path, archive, is_allowed)
            file.seek(0)
            return _open_legacy(path, file, is_allowed)
    except UnpickleError as error:
        raise CheckpointFormatError(
            f"{path} is not a file of torch.save: {error}. It may be truncated, or a Git LFS pointer that was never "
            "fetched."
        ) from None
    except (CheckpointFormatError, CheckpointIncompleteError):
        raise
    except Exception as error:
        # On damaged bytes the readers raise what they run into: BadZipFile, KeyError, UnicodeDecodeError, ...
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
    data = entries["data.pkl"]
    if data.compress_type != zipfile.ZIP_STORED:
        raise CheckpointFormatError(f"{path} is a compressed archive, not a file of torch.save.")
    read = read_pickle(io.BytesIO(archive.read(data)), _storage)
    _refuse(path, read.names, is_allowed)
    size = path.stat().st_size

    def start(storage: _Storage) -> int:
        info = entries.get(f"data/{storage.key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointIncompleteError(f"{path} lacks the data of a tensor (data/{storage.key}).")
        position = _data_start(archive, info)
        needed = storage.numel * itemsize(storage.dtype)
        if info.file_size < needed or position + needed > size:
            raise CheckpointIncompleteError(
                f"{path} is truncated: data/{storage.key} has {info.file_size} bytes, {needed} are needed."
            )
        return position

    return _with_places(path, read, start)


def _data_start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Byte of the archive at which an entry's data starts: behind its own header, which has lengths of its own."""
    file = archive.fp
    assert file is not None
    file.seek(info.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
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
        # Of several views of one storage, files of torch 0.3 give the whole storage's size with each.
        storages.setdefault(storage.key, replace(storage, offset=0))
        return storage

    read = read_pickle(file, load)
    _refuse(path, read.names, is_allowed)
    starts = _legacy_starts(path, file, storages)

    def start(storage: _Storage) -> int:
        if storage.key not in starts:
            raise CheckpointIncompleteError(f"{path} lacks the data of a tensor ({storage.key}).")
        return starts[storage.key] + storage.offset * itemsize(storage.dtype)

    return _with_places(path, read, start)


def _legacy_starts(path: Path, file: BinaryIO, storages: Mapping[str, _Storage]) -> dict[str, int]:
    """Where each storage's bytes start: one after the other in the order of the last pickle, each after its length."""
    keys = read_pickle(file).value
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise CheckpointIncompleteError(f"{path} does not list the tensors that it holds.")
    position, size, starts = file.tell(), os.fstat(file.fileno()).st_size, {}
    for key in keys:
        file.seek(position)
        prefix = file.read(8)
        numel = struct.unpack("<q", prefix)[0] if len(prefix) == 8 else 0
        starts[key] = position + 8
        position += 8 + numel * itemsize(storages[key].dtype)
        if numel < storages[key].numel or len(prefix) < 8 or position > size:
            raise CheckpointIncompleteError(f"{path} is truncated or damaged at byte {starts[key]} of {size}.")
    return starts


def _storage(persistent_id: Any) -> _Storage:
    """A storage from its persistent id: ("storage", type, key, device, number of elements, view or nothing)."""
    kind, storage_type, key, _, numel, *view = persistent_id
    if kind != "storage" or not isinstance(storage_type, Global) or not isinstance(key, str):
        raise ValueError("not a storage")
    if not isinstance(numel, int) or numel < 0:
        raise ValueError("not a size")
    offset = 0
    if view and view[0] is not None:
        _, offset, _ = view[0]
    return _Storage(key, storage_type.name, numel, int(offset))


def _with_places(path: Path, read: Unpickled, start: Callable[[_Storage], int]) -> Any:
    """The pickle's value with its tensors in place of the calls that would rebuild them.

    Of a tensor of a type that safetensors does not have, the name of the type takes the place. Anything that is not a
    container of named things is left as it is.
    """
    done: dict[int, dict[Any, Any]] = {}

    def place(value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        if isinstance(value, dict):
            # What is in several places is placed once, or damage could make it exponentially many.
            if id(value) not in done:
                done[id(value)] = {key: place(item, depth + 1) for key, item in value.items()}
            return done[id(value)]
        if not isinstance(value, Call):
            return value
        if value.function in _REBUILD_PARAMETER and value.arguments:
            return place(value.arguments[0], depth + 1)
        if value.function in _REBUILD_TENSOR and value.arguments:
            storage = value.arguments[0]
            is_known = not isinstance(storage, _Storage) or storage.type in _DTYPES
            return _array(path, value.arguments, start) if is_known else Global(storage.type)
        return value

    return place(read.value, 0)


def _array(path: Path, arguments: tuple[Any, ...], start: Callable[[_Storage], int]) -> StoredArray:
    storage, offset, shape, strides, *_ = arguments
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("not a tensor")
    if len(shape) != len(strides) or not all(
        type(number) is int and number >= 0 for number in (offset, *shape, *strides)
    ):
        raise ValueError("not the shape of a tensor")
    last = offset + _last_element(shape, strides)
    if prod(shape) and last >= storage.numel:
        raise CheckpointIncompleteError(f"{path} holds a tensor that is larger than its data.")
    position = start(storage) + offset * itemsize(storage.dtype)
    return StoredArray(storage.dtype, shape, strides, position, path)


def _last_element(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
