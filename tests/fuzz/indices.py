"""What may be wrong in the index of a distributed checkpoint, before it is pickled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from tests.fuzz.models import DTYPES, OBJECTS
from tests.fuzz.pickles import INTEGERS, TEXTS, Draw, pick

MORE_NAMES = ["decoder.layers", "decoder.layers.0", "layers.weight", "output_layer.weight", "embedding._extra_state"]
MORE_NAMES += [
    "decoder.layers.9999999999999999999.mlp.linear_fc1.bias",
    "decoder.layers.00.mlp.linear_fc1.bias",
    "a" * 999,
]
MORE_NAMES += ["optimizer.state.exp_avg.x", "chained_0.optimizer.x", "module.module.decoder.final_layernorm.bias"]
SHAPES = [(), (0,), (1,), (2**17, 0), (10**5, 0), (0, 2**40), (2**31, 1), (2**40,), (2**61, 2), (1,) * 64, (1,) * 65]


_PATHS = ["__0_0.distcp", "__0_1.distcp", "__7_0.distcp", "__0_0.distcp\n", "../secret", "/dev/zero", "common.pt", ""]
_PATHS += ["a" * 300, "__\u0661_0.distcp", "__0_0.distcp/", "./__0_0.distcp", "\ud800", "__0_" + "9" * 9 + ".distcp"]
_chunk = dcp.ChunkStorageMetadata
_FIELDS_OF_INDEX = ["state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version", "mcore_data"]


def edit_index(draw: Draw, metadata: dcp.Metadata) -> None:
    """Change one thing in it."""
    fields = (getattr(metadata, name, None) for name in ("storage_data", "state_dict_metadata"))
    if all(isinstance(field, dict) for field in fields):
        with suppress(TypeError):  # of what an earlier edit has made unhashable
            pick(draw, _EDITS)(draw, metadata)


def _number(draw: Draw, old: Any) -> Any:
    near = [old + d for d in (-8, -1, 1, 8, 2**32)] if isinstance(old, int) else []
    return pick(draw, [*near, draw(INTEGERS), pick(draw, OBJECTS)])


def _place(draw: Draw, metadata: dcp.Metadata) -> None:
    """Where a record lies."""
    for place in _some(draw, list(metadata.storage_data.values())):
        if isinstance(place, _StorageInfo):
            name = pick(draw, ["relative_path", "relative_path", "offset", "offset", "length", "transform_descriptors"])
            new = pick(draw, _PATHS) if name == "relative_path" else _number(draw, getattr(place, name))
            setattr(place, name, pick(draw, [["zstd"], "", ()]) if name.startswith("transform") else new)


def _places(draw: Draw, metadata: dcp.Metadata) -> None:
    """Which record is whose."""
    places = metadata.storage_data
    for index in _some(draw, list(places)):
        other = pick(draw, list(places))
        match pick(draw, ["drop", "share", "swap", "value", "name", "offset", "index"]):
            case "drop":
                del places[index]
            case "share":
                places[index] = places[other]
            case "swap":
                places[index], places[other] = places[other], places[index]
            case "value":
                places[index] = pick(draw, OBJECTS)
            case "offset":
                # Its hash is that of what it was, which only matters to Python.
                object.__setattr__(index, "offset", pick(draw, [_size(draw, index.offset), pick(draw, OBJECTS)]))
            case field:
                object.__setattr__(
                    index, {"name": "fqn"}.get(field, field), pick(draw, [other.fqn, *MORE_NAMES, *OBJECTS])
                )


def _size(draw: Draw, old: Any) -> Any:
    """A shape with one number changed, more or fewer of them; of another class than torch's where that cannot be."""
    new = list(old) if isinstance(old, (list, tuple)) else []
    at = draw(st.integers(0, max(len(new) - 1, 0)))
    match pick(draw, ["number", "number", "drop", "insert", "shape"]):
        case "number" if new:
            new[at] = _number(draw, new[at])
        case "drop" if new:
            del new[at]
        case "insert":
            new.insert(at, pick(draw, [0, 1, 2, -1]))
        case _:
            new = list(pick(draw, SHAPES))
    if all(type(number) is int and abs(number) < 2**63 for number in new) and draw(st.booleans()):
        return torch.Size(new)
    return pick(draw, [tuple, list])(new)


def _stored(draw: Draw, metadata: dcp.Metadata) -> None:
    """What is said of a tensor or an object."""
    stored: dict[str, Any] = metadata.state_dict_metadata
    for name in _some(draw, sorted(stored)):
        match pick(draw, ["drop", "name", "object", "value", "other", "dtype", "size", "size", "properties", "state"]):
            case "drop":
                del stored[name]
            case "name":
                stored[pick(draw, [*MORE_NAMES, draw(TEXTS)])] = stored.pop(name)
            case "object":
                stored[name] = dcp.BytesStorageMetadata()
            case "value":
                stored[name] = pick(draw, OBJECTS)
            case "other":
                stored[name] = stored[pick(draw, sorted(stored))]
            case "state":
                stored[name].__dict__[pick(draw, ["size", "chunks", "x"])] = pick(draw, OBJECTS)
            case _ if not isinstance(stored[name], dcp.TensorStorageMetadata):
                continue
            case "dtype" if isinstance(stored[name].properties, dcp.TensorProperties):
                stored[name].properties.dtype = pick(draw, [*DTYPES, *OBJECTS])
            case "size":
                stored[name].size = _size(draw, stored[name].size)
            case "properties":
                stored[name].properties = pick(draw, [*OBJECTS, {"dtype": torch.float32}, (torch.float16,)])


def _chunks(draw: Draw, metadata: dcp.Metadata) -> None:
    """Into which boxes a tensor is cut."""
    stored: dict[str, Any] = metadata.state_dict_metadata
    tensors = [s for s in stored.values() if isinstance(s, dcp.TensorStorageMetadata) and isinstance(s.chunks, list)]
    for tensor in _some(draw, [tensor for tensor in tensors if tensor.chunks]):
        at, chunk = draw(st.integers(0, len(tensor.chunks) - 1)), pick(draw, tensor.chunks)
        match pick(draw, ["drop", "again", "value", "empty", "grid", "offsets", "offsets", "sizes", "sizes"]):
            case "drop":
                del tensor.chunks[at]
            case "again":
                tensor.chunks.extend([chunk] * pick(draw, [1, 1, 3000]))
            case "value":
                tensor.chunks[at] = pick(draw, OBJECTS)
            case "empty":
                zeros = torch.Size([0] * len(tensor.size)) if isinstance(tensor.size, tuple) else torch.Size([0])
                tensor.chunks.extend([_chunk(zeros, zeros)] * pick(draw, [1, 1, 3000]))
            case "grid":
                count, dims = pick(draw, [(3, 2), (2, 5), (24, 3)])
                one, places = torch.Size([1] * dims), product(range(count), repeat=dims)
                tensor.size, tensor.chunks = (
                    torch.Size([count] * dims),
                    [_chunk(torch.Size(place), one) for place in places],
                )
            case name if isinstance(chunk, dcp.ChunkStorageMetadata):
                setattr(chunk, name, _size(draw, getattr(chunk, name)))


def _field(draw: Draw, metadata: dcp.Metadata) -> None:
    """Another field of the index itself, or one that is missing."""
    name = pick(draw, _FIELDS_OF_INDEX)
    setattr(metadata, name, pick(draw, [*OBJECTS, dcp.StorageMeta(), metadata.storage_data]))
    if draw(st.booleans()):
        del metadata.__dict__[name]


def _some(draw: Draw, items: list[Any]) -> list[Any]:
    """One of them, or none if there are none."""
    return [pick(draw, items)] if items else []


_EDITS: list[Callable[[Draw, dcp.Metadata], None]] = [
    _place,
    _place,
    _places,
    _places,
    _stored,
    _stored,
    _stored,
    _chunks,
    _chunks,
    _field,
]
