"""Checkpoint directories: their format, their tensors by slices under the models' names, and how one is written whole.

Nothing here knows a process group or imports transformers, and torch is imported only to return a tensor.
"""

from __future__ import annotations

from hf_megatron.checkpoint.atomic_directory import AtomicDirectory
from hf_megatron.checkpoint.directory import Checkpoint, open_checkpoint, open_files, read_json
from hf_megatron.checkpoint.lazy import LazyTensor, Piece
from hf_megatron.checkpoint.safetensors_header import (
    DTYPES,
    Header,
    StoredTensor,
    itemsize,
    read_header,
    torch_dtype,
)
from hf_megatron.checkpoint.sharded import SHARDING_INFO
from hf_megatron.checkpoint.spelling import (
    Canonical,
    canonicalise,
    listed,
    model_class_of,
    require_complete,
    respelled,
    stored_model,
)

__all__ = [
    "DTYPES",
    "SHARDING_INFO",
    "AtomicDirectory",
    "Canonical",
    "Checkpoint",
    "Header",
    "LazyTensor",
    "Piece",
    "StoredTensor",
    "canonicalise",
    "itemsize",
    "listed",
    "model_class_of",
    "open_checkpoint",
    "open_files",
    "read_header",
    "read_json",
    "require_complete",
    "respelled",
    "stored_model",
    "torch_dtype",
]
