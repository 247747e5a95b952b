"""Read and validate the header of a safetensors file, without reading tensor data.

A file is eight bytes (little-endian length of the header), the header (JSON), then the tensors' bytes, row-major.

Source: the format section of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError

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
# The limit of the format. Without it, a damaged length could make us allocate up to 2**64 bytes.
_MAX_HEADER_BYTES = 100_000_000


class StoredTensor(NamedTuple):
    """One tensor of a file: dtype, shape, and the half-open byte range of its data, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    data_start: int
    data_stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """Header of one file: its tensors by name, in the order of the header, and its free-form metadata."""

    path: Path
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


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    CheckpointIncompleteError if the file is shorter or longer than its header says, CheckpointFormatError if it is not
    a safetensors file or uses a dtype unknown here.
    """
    if not path.is_file():  # a directory, or a link that leads nowhere or back to itself
        raise CheckpointFormatError(f"{path} is not a file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES:
            raise CheckpointIncompleteError(f"{path} is truncated: it holds {size} bytes, not even a header.")
        length = int.from_bytes(prefix, "little")
        if length > _MAX_HEADER_BYTES:
            raise CheckpointFormatError(
                f"{path} is not a safetensors file: its header would be {length} bytes long (a Git LFS pointer that "
                "was never fetched?)."
            )
        raw = file.read(length)
    start = _LENGTH_BYTES + length
    if len(raw) < length:
        raise CheckpointIncompleteError(
            f"{path} is truncated: its header ends at byte {start}, the file has {size} bytes. Fetch it again."
        )
    try:
        entries = json.loads(raw)
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        tensors = {name: _tensor(entry, start) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointFormatError(f"{path} is not a safetensors file: {error or type(error).__name__}.") from error
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
    return Header(path, tensors, metadata)


def _tensor(entry: dict[str, Any], start: int) -> StoredTensor:
    dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"shape {entry['shape']} or data_offsets {entry['data_offsets']} are not sizes")
    if last - first != prod(shape) * itemsize(dtype):
        raise ValueError(f"a {dtype} tensor of shape {list(shape)} does not fill bytes {first} to {last}")
    return StoredTensor(dtype, shape, start + first, start + last)
