"""Checkpoint directories: detecting the format, reading tensors by slices under stock names, and writing atomically.

No module here uses a process group or imports transformers. torch is imported only to return tensors.
"""

from __future__ import annotations

from hf_megatron.checkpoint.atomic_directory import AtomicDirectory
from hf_megatron.checkpoint.directory import open_checkpoint, open_files, read_json
from hf_megatron.checkpoint.lazy import LazyTensor, Piece
from hf_megatron.checkpoint.safetensors_header import DTYPES, itemsize, read_header, torch_dtype
from hf_megatron.checkpoint.sharded import SHARDING_INFO
from hf_megatron.checkpoint.spelling import canonicalise, listed, model_class_of, require_complete, stored_model

__all__ = [
    "DTYPES",
    "SHARDING_INFO",
    "AtomicDirectory",
    "LazyTensor",
    "Piece",
    "canonicalise",
    "itemsize",
    "listed",
    "model_class_of",
    "open_checkpoint",
    "open_files",
    "read_header",
    "read_json",
    "require_complete",
    "stored_model",
    "torch_dtype",
]
