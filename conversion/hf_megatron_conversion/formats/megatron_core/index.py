"""``.metadata``: where in which file each chunk of each tensor lies, pickled as torch's own classes.

Source: ``torch.distributed.checkpoint.metadata`` and ``_StorageInfo`` in ``torch.distributed.checkpoint.filesystem``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_megatron.checkpoint import DTYPES
from hf_megatron_conversion.tensors import Readable, Reshaped
from hf_megatron_conversion.torch_pickle import Call, GlobalName, Instance, pickled
from hf_megatron_conversion.torch_zip import Archive

_METADATA = "torch.distributed.checkpoint.metadata"
_CONTIGUOUS = Call(GlobalName(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
_STRIDED = Call(GlobalName("torch.serialization", "_get_layout"), ("torch.strided",))


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a tensor, as it is stored."""

    key: str
    tensor: Readable | Reshaped
    size: tuple[int, ...]  # the whole tensor's shape
    offset: tuple[int, ...]  # where in that the part starts

    @cached_property
    def archive(self) -> Archive:
        return Archive("archive", self.tensor)


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """Something else, of which there may be one per layer."""

    key: str
    content: object
    count: int  # of objects of this name
    number: int  # of this one

    @cached_property
    def archive(self) -> Archive:
        return Archive("archive", [self.content])

    @property
    def name(self) -> str:
        """The key that says which one it is."""
        return f"{self.key}/shard_{self.number}_{self.count}"


Record = Chunk | StoredObject


def index(files: Iterable[tuple[str, Sequence[Record]]]) -> bytes:
    """The content of ``.metadata`` for files of records, in which one follows the other."""
    tensors: dict[str, list[Chunk]] = {}
    objects: dict[str, Instance] = {}
    storage: dict[Instance, Instance] = {}
    for file, records in files:
        position = 0
        for record in records:
            length = record.archive.nbytes
            place = {"relative_path": file, "offset": position, "length": length}
            where: dict[str, Any] = {"fqn": record.key, "index": None}
            if isinstance(record, Chunk):
                tensors.setdefault(record.key, []).append(record)
                where["offset"] = _size(record.offset)
            else:
                objects[record.name] = Instance(GlobalName(_METADATA, "BytesStorageMetadata"))
                where["fqn"] = record.name
            found = Instance(GlobalName("torch.distributed.checkpoint.filesystem", "_StorageInfo"), place)
            storage[Instance(GlobalName(_METADATA, "MetadataIndex"), where)] = found
            position += length
    metadata = {
        "state_dict_metadata": {key: _tensor(chunks) for key, chunks in tensors.items()} | objects,
        "planner_data": None,
        "storage_data": storage,
        "storage_meta": None,
        "version": None,
    }
    return pickled(Instance(GlobalName(_METADATA, "Metadata"), metadata))[0]


def _tensor(chunks: Sequence[Chunk]) -> Instance:
    dtype = GlobalName("torch", DTYPES[chunks[0].tensor.dtype][1])
    properties = Instance(GlobalName(_METADATA, "TensorProperties"), (dtype, _STRIDED, False, _CONTIGUOUS, False))
    parts = [{"offsets": _size(chunk.offset), "sizes": _size(chunk.tensor.shape)} for chunk in chunks]
    state = {
        "properties": properties,
        "size": _size(chunks[0].size),
        "chunks": [Instance(GlobalName(_METADATA, "ChunkStorageMetadata"), part) for part in parts],
    }
    return Instance(GlobalName(_METADATA, "TensorStorageMetadata"), state)


def _size(shape: Sequence[int]) -> Call:
    return Call(GlobalName("torch", "Size"), (tuple(shape),))
