"""Read and validate the header of a safetensors file, without reading tensor data.

A file is eight bytes (little-endian length of the header), the header (JSON), then the tensors' bytes, row-major.

Source: the format section of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_megatron.checkpoint.budgets import (
    MAX_DIMENSIONS,
    MAX_KEY_LENGTH,
    MAX_SAFETENSORS_HEADER_BYTES,
    MAX_SAFETENSORS_HEADERS_BYTES,
    MAX_TENSORS,
    require_within,
)
from hf_megatron.checkpoint.file_identity import FileIdentity
from hf_megatron.checkpoint.json_text import ObjectWithDuplicates, parse_json
from hf_megatron.checkpoint.regular_file import open_regular
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, shown

if TYPE_CHECKING:
    import torch


# Spelling in the file -> (bytes per element, name in torch).
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "C64": (8, "complex64"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}

_LENGTH_BYTES = 8
_SIZES = 2**64  # are smaller than this, in bits too
_FIELDS = ("dtype", "shape", "data_offsets")
_METADATA = "__metadata__"


class StoredTensor(NamedTuple):
    """One tensor of a file: dtype, shape, and the half-open byte range of its data, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    data_start: int
    data_stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """Header of one file: its tensors by name, in the order of the header, and its free-form metadata.

    ``identity`` is that of the file it was read from.
    """

    path: Path
    identity: FileIdentity
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def itemsize(dtype: str) -> int:
    """Bytes per element of a dtype in safetensors' spelling."""
    return DTYPES[dtype][0]


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of one in safetensors' spelling: ``"BF16"`` -> ``torch.bfloat16``."""
    import torch

    result = getattr(torch, DTYPES[dtype][1])
    assert isinstance(result, torch.dtype)
    return result


def require_headers_within_limit(paths: Iterable[Path]) -> None:
    """Raise CheckpointFormatError if the headers of all these files together are beyond the limit.

    Only what each file says of its header is read; :func:`read_header` looks at it.
    """
    total = 0
    for path in paths:
        length = 0
        with suppress(OSError), open_regular(path) as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        total += length if length <= MAX_SAFETENSORS_HEADER_BYTES else 0
        if total > MAX_SAFETENSORS_HEADERS_BYTES:
            raise CheckpointFormatError(
                f"{path} is refused: with it the files have headers of {total:,} bytes, and the limit is "
                f"{MAX_SAFETENSORS_HEADERS_BYTES:,}."
            )


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    CheckpointIncompleteError if the file is shorter or longer than its header says, CheckpointFormatError if it is not
    a safetensors file, is beyond a limit, or uses a dtype unknown here.
    """
    try:
        with open_regular(path) as file:
            identity = FileIdentity.of(file.fileno())
            size = identity.size
            prefix = file.read(_LENGTH_BYTES)
            if len(prefix) < _LENGTH_BYTES:
                raise CheckpointIncompleteError(f"{path} is truncated: it holds {size} bytes, not even a header.")
            length = int.from_bytes(prefix, "little")
            if length > MAX_SAFETENSORS_HEADER_BYTES:
                raise CheckpointFormatError(
                    f"{path} is not a safetensors file: its header would be {length} bytes long, and the limit is "
                    f"{MAX_SAFETENSORS_HEADER_BYTES} (a Git LFS pointer that was never fetched?)."
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointFormatError(f"{path} cannot be read: {error.strerror}.") from error
    start = _LENGTH_BYTES + length
    if len(raw) < length:
        raise CheckpointIncompleteError(
            f"{path} is truncated: its header ends at byte {start}, the file has {size} bytes. Fetch it again."
        )
    try:
        tensors, metadata = _parsed(raw, start)
    except ValueError as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeError) else str(error)
        raise CheckpointFormatError(f"{path} is not a safetensors file: {reason}.") from error
    stop = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.data_start, tensor.data_stop)):
        if tensor.data_start != stop:
            raise CheckpointFormatError(
                f"{path} is damaged: one tensor ends at byte {stop} and the next one starts at {tensor.data_start}."
            )
        stop = tensor.data_stop
    if stop != size:
        word = "truncated" if size < stop else "too long"
        raise CheckpointIncompleteError(
            f"{path} is {word}: its header describes {stop} bytes, the file has {size}. Fetch it again."
        )
    return Header(path, identity, tensors, metadata)


def _parsed(raw: bytes, start: int) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a header, as the reference implementation takes them; ValueError if it does not.

    Names that occur twice, and what is beyond a limit, are refused, though the reference implementation takes them.
    """
    entries = parse_json(raw, strict=True)
    if not isinstance(entries, dict):
        raise ValueError("its header is not an object")
    metadata = entries.pop(_METADATA, None)
    for part in (entries, metadata):
        if isinstance(part, ObjectWithDuplicates):  # of which the reference implementation takes the last
            raise ValueError(f"it has {shown(min(part.duplicates))} twice")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"its {_METADATA} is not an object of texts")
    require_within(MAX_TENSORS, len(entries), "tensors")
    require_within(MAX_KEY_LENGTH, max(map(len, entries), default=0), "characters in a tensor's name")
    return {name: _tensor(name, entry, start) for name, entry in entries.items()}, dict(metadata)


def _tensor(name: str, entry: Any, start: int) -> StoredTensor:
    if isinstance(entry, list) and len(entry) == len(_FIELDS):  # the reference implementation takes this too
        entry = dict(zip(_FIELDS, entry, strict=True))
    duplicates = entry.duplicates if isinstance(entry, ObjectWithDuplicates) else frozenset()
    if not isinstance(entry, dict) or not entry.keys() >= set(_FIELDS) or not duplicates.isdisjoint(_FIELDS):
        raise ValueError(f"{shown(name)} does not have one {', one '.join(_FIELDS)}")
    dtype, shape, offsets = (entry[field] for field in _FIELDS)
    if isinstance(dtype, dict) and len(dtype) == 1 and list(dtype.values()) == [None]:
        (dtype,) = dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {shown(dtype)} of {shown(name)} is not one of {', '.join(DTYPES)}")
    is_place = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not is_place or not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        raise ValueError(f"shape {shown(shape)} or data_offsets {shown(offsets)} of {shown(name)} are not sizes")
    require_within(MAX_DIMENSIONS, len(shape), f"dimensions in {shown(name)}")
    numel, (first, last) = 1, offsets
    for number in shape:
        numel *= number
        if numel >= _SIZES:
            break
    if 8 * itemsize(dtype) * numel >= _SIZES or last - first != numel * itemsize(dtype):
        raise ValueError(
            f"{shown(name)}, a {dtype} tensor of shape {shown(shape)}, does not fill bytes {first} to {last}"
        )
    return StoredTensor(dtype, tuple(shape), start + first, start + last)
