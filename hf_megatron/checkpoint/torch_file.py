"""Read ``torch.save`` files without unpickling: the object as plain data, and the file offset of each tensor.

Since torch 1.6, a file is a zip archive of uncompressed entries: ``data.pkl`` and one per storage. Before, it was five
consecutive pickles, followed by the length and bytes of each storage. This module reads only the pickles, as data (see
``unpickle``): nothing is imported or called, and names outside an explicit list are rejected, in every pickle that
``torch.load`` would run. A file in which torch could find another pickle than this module is rejected too.

Source: ``torch.serialization`` and ``torch._utils._rebuild_tensor_v2`` in torch 2.13.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from hf_megatron.checkpoint.budgets import MAX_DIMENSIONS, MAX_NESTING, MAX_PICKLE_BYTES, BudgetError, require_within
from hf_megatron.checkpoint.lazy import LazyTensor, Piece
from hf_megatron.checkpoint.regular_file import open_regular
from hf_megatron.checkpoint.safetensors_header import itemsize
from hf_megatron.checkpoint.section import Section, size_of
from hf_megatron.checkpoint.unpickle import Call, Global, UnpickleError, globals_in, read_pickle
from hf_megatron.checkpoint.zip_directory import ZIP_MAGIC, ZipError, data_start, is_archive, read_directory
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, shown
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
_DTYPES = {Global(module, name): dtype for dtype, name in STORAGES.items() for module in ("torch", "torch.cuda")}
_REBUILD_TENSOR = globals_in("torch._utils", "_rebuild_tensor_v2", "_rebuild_tensor")
_REBUILD_PARAMETER = globals_in("torch._utils", "_rebuild_parameter", "_rebuild_parameter_with_state")
# That safetensors has not, with the bytes of an element.
_OTHER_STORAGES = {
    **{Global("torch", f"Complex{name}Storage"): nbytes for name, nbytes in (("Float", 8), ("Double", 16))},
    **{Global("torch", f"Q{name}Storage"): nbytes for name, nbytes in (("Int8", 1), ("Int32", 4), ("UInt8", 1))},
    Global("torch.storage", "UntypedStorage"): 1,
}
TENSOR_GLOBALS = (
    globals_in("torch", "Size")
    | globals_in("collections", "OrderedDict")
    | _DTYPES.keys()
    | _OTHER_STORAGES.keys()
    | _REBUILD_TENSOR
    | _REBUILD_PARAMETER
)
"""All that a dictionary of tensors asks for."""

# The first two of the five pickles, a magic number and the version of the format, by the protocol they were written in.
_LEGACY_STARTS = [
    pickle.dumps(0x1950A86A20F9469CFC6C, protocol) + pickle.dumps(1001, protocol)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
]


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    type: Global
    numel: int
    offset: int = 0  # elements before this view of it (files of torch 0.3)
    size: int = 0  # elements of the view

    @property
    def nbytes(self) -> int:
        dtype = _DTYPES.get(self.type)
        return self.numel * (_OTHER_STORAGES[self.type] if dtype is None else itemsize(dtype))


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
                f"{path}: {shown(name)} is a {kind}; only named tensors, of types that safetensors has, are expected."
            )
        tensors[name] = value.lazy(name)
    return tensors


def open_torch_file(
    path: Path, allowed: Collection[Global] = TENSOR_GLOBALS, *, section: tuple[int, int] | None = None
) -> Any:
    """Read the object of a ``torch.save`` file, with a :class:`StoredArray` in place of each tensor.

    ``allowed`` are the globals that the pickle may name, which are not looked up in any case. ``section`` is where the
    file lies in a larger one: its first byte and its length. CheckpointFormatError if it is no file of ``torch.save``,
    is beyond a limit, or names something else; CheckpointIncompleteError if it is truncated or damaged.
    """
    try:
        with open_regular(path) as file:
            if section is not None:
                return _open_zip(path, Section(file, *section), allowed, section[0])  # type: ignore[arg-type]
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
            return _open_zip(path, file, allowed) if is_zip else _open_legacy(path, file, allowed)
    except (CheckpointFormatError, CheckpointIncompleteError):
        raise
    except (UnpickleError, ZipError) as error:
        raise CheckpointFormatError(
            f"{path} is not a file of torch.save: {error}. It may be truncated, or a Git LFS pointer that was never "
            "fetched."
        ) from None
    except BudgetError as error:
        raise CheckpointFormatError(f"{path} is refused: {error}.") from None
    except OSError as error:
        raise CheckpointIncompleteError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointIncompleteError(f"{path} cannot be read; is it truncated? {shown(repr(error))}") from error


def _read_pickle(
    path: Path, stream: BinaryIO, allowed: Collection[Global], load: Callable[[Any], Any] | None = None
) -> Any:
    """The value of the next pickle, if it asks for nothing that is not allowed."""
    read = read_pickle(stream, load)
    if refused := read.refused(allowed):
        names = ", ".join(name if name.isprintable() else shown(name) for name in refused[:20])
        raise CheckpointFormatError(
            f"{path} is refused: its pickle asks for {names}, and loading it elsewhere could run any code. Nothing of "
            "it was run. Get the weights as safetensors, or from a source that you trust."
        )
    return read.value


def _open_zip(path: Path, file: BinaryIO, allowed: Collection[Global], first_byte: int = 0) -> Any:
    """An archive, which starts at ``first_byte`` of the file that it lies in."""
    entries = read_directory(file)
    if "constants.pkl" in entries:
        raise CheckpointFormatError(f"{path} is a TorchScript program, not a file of torch.save.")
    if "data.pkl" not in entries:
        raise CheckpointIncompleteError(f"{path} cannot be read: it is an archive without data.pkl.")

    def content(name: str, limit: int) -> bytes:
        entry = entries[name]
        require_within(limit, entry.size, f"bytes in {name}")
        file.seek(data_start(file, entry))
        data = file.read(entry.size)
        if len(data) < entry.size:
            raise CheckpointIncompleteError(f"{path} is truncated: {name} has {entry.size} bytes.")
        return data

    if "byteorder" in entries and content("byteorder", 16) != b"little":
        raise CheckpointFormatError(f"{path} was written on a big-endian machine; convert it there.")
    storages = _Storages()
    stream = io.BytesIO(content("data.pkl", MAX_PICKLE_BYTES))
    value = _read_pickle(path, stream, allowed, storages.load)
    if stream.read(1):
        raise UnpickleError("its data.pkl goes on behind the pickle")
    size = size_of(file)

    def start(storage: _Storage) -> int:
        entry = entries.get(f"data/{storage.key}")
        if entry is None:
            raise CheckpointIncompleteError(f"{path} lacks the data of a tensor (data/{storage.key}).")
        position = data_start(file, entry)
        if entry.size < storage.nbytes or position + storage.nbytes > size:
            raise CheckpointIncompleteError(
                f"{path} is truncated: data/{storage.key} has {entry.size} bytes, {storage.nbytes} are needed."
            )
        return first_byte + position

    return _with_places(path, value, start)


def _open_legacy(path: Path, file: BinaryIO, allowed: Collection[Global]) -> Any:
    """A file of torch before 1.6."""
    file.seek(0)
    first = file.read(tarfile.BLOCKSIZE)
    magic = next((start for start in _LEGACY_STARTS if first.startswith(start)), None)
    if magic is None:
        raise UnpickleError("it does not start as one")
    with suppress(tarfile.HeaderError):
        # torch tries this first.
        tarfile.TarInfo.frombuf(first, "utf-8", "surrogateescape")
        raise CheckpointFormatError(f"{path} is refused: it is a tar archive too, which torch.load would read instead.")
    if is_archive(file):
        raise CheckpointFormatError(f"{path} is refused: it is a zip archive too, which could be read instead.")
    file.seek(len(magic))
    system = _read_pickle(path, file, ())
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise CheckpointFormatError(f"{path} was written on a big-endian machine; convert it there.")
    storages = _Storages()
    value = _read_pickle(path, file, allowed, storages.load)
    # The storage keys follow, then the length and bytes of each storage in that order.
    keys = _read_pickle(path, file, ())
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(keys) != len(set(keys)):
        raise CheckpointIncompleteError(f"{path} does not list the tensors that it holds.")
    if set(keys) != set(storages.known):
        raise CheckpointIncompleteError(f"{path} does not list the tensors that it holds.")
    position, size, starts = file.tell(), os.fstat(file.fileno()).st_size, {}
    for key in keys:
        file.seek(position)
        prefix = file.read(8)
        starts[key] = position + 8
        storage = storages.known[key]
        position += 8 + storage.nbytes
        if prefix != struct.pack("<q", storage.numel) or position > size:
            raise CheckpointIncompleteError(f"{path} is truncated or damaged at byte {starts[key]} of {size}.")
    if position != size:
        raise CheckpointIncompleteError(f"{path} is damaged: its last tensor ends at byte {position} of {size}.")
    return _with_places(path, value, lambda storage: starts[storage.key])


class _Storages:
    """The storages of a file, from persistent ids: ("storage", type, key, device, number of elements, view or None)."""

    def __init__(self) -> None:
        self.known: dict[str, _Storage] = {}

    def load(self, persistent_id: Any) -> _Storage:
        """The storage, or view of one, that an id stands for."""
        kind, storage_type, key, _, numel, *view = persistent_id
        is_known = isinstance(storage_type, Global) and storage_type in _DTYPES.keys() | _OTHER_STORAGES.keys()
        if kind != "storage" or type(key) is not str or not is_known:
            raise UnpickleError("it has a persistent id that is no storage")
        _, offset, size = view[0] if view and view[0] is not None else ("", 0, numel)
        if not all(type(number) is int and number >= 0 for number in (numel, offset, size)) or offset + size > numel:
            message = f"{shown(size)} elements from {shown(offset)} on, of {shown(numel)}"
            raise UnpickleError(f"it has a view beyond its storage: {message}")
        whole = _Storage(key, storage_type, numel, 0, numel)
        if self.known.setdefault(key, whole) != whole:
            raise UnpickleError(f"it has one storage, {shown(key)}, with two sizes or types")
        return _Storage(key, storage_type, numel, offset, size)


def _with_places(path: Path, content: Any, start: Callable[[_Storage], int]) -> Any:
    """A pickle's value with its tensors, or their type if safetensors lacks it, in place of the calls for them.

    Anything that is not a container of named things is left as it is.
    """
    done: dict[int, dict[Any, Any]] = {}

    def place(value: Any, depth: int) -> Any:
        require_within(MAX_NESTING, depth, "dictionaries within each other")
        if isinstance(value, dict):
            # Convert shared objects only once: damaged files could otherwise expand exponentially.
            if id(value) not in done:
                done[id(value)] = {key: place(item, depth + 1) for key, item in value.items()}
            return done[id(value)]
        if isinstance(value, Call) and value.function in _REBUILD_PARAMETER and value.arguments:
            # A state could give it other data.
            if value.state is not None or value.items or any(value.arguments[3:]):
                raise UnpickleError("it has a parameter with more than torch.save stores of one")
            return place(value.arguments[0], depth + 1)
        if isinstance(value, Call) and value.function in _REBUILD_TENSOR and value.arguments:
            return _array(path, value, start)
        return value

    return place(content, 0)


def _array(path: Path, call: Call, start: Callable[[_Storage], int]) -> StoredArray | Global:
    storage, offset, shape, strides, *rest = call.arguments + (None,) * (4 - len(call.arguments))
    if isinstance(storage, _Storage) and storage.type not in _DTYPES:
        return storage.type
    is_tensor = isinstance(storage, _Storage) and type(shape) is type(strides) is tuple
    if not is_tensor or not all(type(number) is int for number in (offset, *shape, *strides)):
        raise UnpickleError("it has a tensor that is none")
    # What could give the tensor other values than its storage has: a state, or metadata such as "is negated".
    if call.state is not None or call.items or any(isinstance(item, dict) and item for item in rest[2:]):
        raise UnpickleError("it has a tensor with more than torch.save stores of one")
    require_within(MAX_DIMENSIONS, len(shape), "dimensions in a tensor")
    if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
        raise UnpickleError(f"it has a tensor of shape {shown(shape)}, strides {shown(strides)} and offset {offset}")
    numel = prod(shape)
    if numel and offset + _span(shape, strides) > storage.size:
        raise CheckpointIncompleteError(f"{path} holds a tensor that is larger than its data.")
    # A view of more elements than there are, or with a stride of 0.
    if numel > storage.size or (numel and any(n > 1 > stride for n, stride in zip(shape, strides, strict=True))):
        raise CheckpointFormatError(
            f"{path} is refused: a tensor of shape {shown(shape)} repeats its values (strides {shown(strides)}), so "
            "that a few bytes could fill any disk. Save it with .contiguous()."
        )
    dtype = _DTYPES[storage.type]
    return StoredArray(dtype, shape, strides, start(storage) + (storage.offset + offset) * itemsize(dtype), path)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first one to the last."""
    distance = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return 1 + distance if prod(shape) else 0
