"""Distributed checkpoints as Megatron-core saves them, written with torch's own classes.

The weights, and what Megatron computes with them, are those of ``tests.conversion.megatron_lm.generator``; nothing here
comes from the package.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from tests.conversion.megatron_lm.generator import Tensors, Variant, arguments_of, flat_state, make_weights

_CUT_ON_0 = re.compile(r"word_embeddings|output_layer|(linear_qkv|linear_fc1)\.(weight|bias)")
_CUT_ON_1 = re.compile(r"(linear_proj|linear_fc2)\.weight")


@dataclass(frozen=True, kw_only=True)
class Distributed(Variant):
    """A model, and how Megatron-core was asked to save it."""

    names: str = "te"  # which both layer specifications have in these files
    gelu: str = "fused"
    is_stacked: bool = True  # the layers in one tensor; without that each has its own key
    prefix: str = ""
    common: str | None = "file"  # common.pt until core 0.18, then an "object"; None for neither
    has_optimizer: bool = False
    has_save_plans: bool = True


Chunks = list[tuple[tuple[int, ...], torch.Tensor]]
"""Offset and content of each."""


@dataclass
class Content:
    """What will be written, so that a test can change it first."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    chunks: dict[str, Chunks] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    common: Any = None  # of common.pt
    mark: dict[str, Any] = field(default_factory=lambda: {"sharded_backend": "torch_dist"})
    change_metadata: Callable[[dcp.Metadata], None] = lambda metadata: None
    replaced: tuple[str, str] = ("", "")  # texts of equal length, in the finished index
    raw_records: dict[str, bytes] = field(default_factory=dict)  # in place of what torch.save makes of a chunk


def content_of(variant: Distributed, weights: Tensors) -> Content:
    """A checkpoint, as it should be."""
    content = Content()
    ranks = [
        flat_state(variant, weights, rank, range(variant.layers), is_first=True, is_last=True)
        for rank in range(variant.tp)
    ]
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        found = re.fullmatch(r"(.+\.layers)\.(\d+)\.(.+)", name) if variant.is_stacked else None
        key, layer = (name, None) if found is None else (f"{found[1]}.{found[3]}", int(found[2]))
        key = variant.prefix + key
        if name.endswith("_extra_state"):
            of = "0_1" if layer is None else f"{layer}_{variant.layers}"
            content.objects[f"{key}/shard_{of}"] = parts[0]
            continue
        dim = 0 if _CUT_ON_0.search(name) else 1 if _CUT_ON_1.search(name) else None
        whole = parts[0] if dim is None else torch.cat(parts, dim)
        position = 0
        for part in parts if dim is not None else parts[-1:]:
            offset = [0] * part.dim()
            if dim is not None:
                offset[dim], position = position, position + part.shape[dim]
            stacked = part if layer is None else part.unsqueeze(0)
            first = () if layer is None else (layer,)
            content.chunks.setdefault(key, []).append(((*first, *offset), stacked))
        content.shapes[key] = tuple(whole.shape) if layer is None else (variant.layers, *whole.shape)
    if variant.has_optimizer:
        for key in list(content.chunks):
            for moment in ("exp_avg", "exp_avg_sq"):
                name = f"optimizer.state.{moment}.{key}"
                content.shapes[name] = content.shapes[key]
                content.chunks[name] = [(offset, torch.zeros_like(part)) for offset, part in content.chunks[key]]
    content.objects["rng_state/shard_0_1"] = [{"torch_rng_state": torch.ByteTensor(8)}]
    common = {"args": arguments_of(variant), "checkpoint_version": 3.0, "iteration": 1000}
    if variant.common == "file":
        content.common = common
        content.mark |= {"sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
    elif variant.common == "object":
        content.objects["common_state/shard_0_1"] = common
    return content


def write(directory: Path, variant: Distributed, weights: Tensors | None = None) -> Path:
    """Write the checkpoint as ``iter_0001000`` under ``directory``, and return ``directory``."""
    content = content_of(variant, make_weights(variant) if weights is None else weights)
    write_content(directory / "iter_0001000", content)
    (directory / "latest_checkpointed_iteration.txt").write_text("1000")
    return directory


def write_content(place: Path, content: Content) -> None:
    """Write one iteration."""
    place.mkdir(parents=True)
    for name, data in files_of(content).items():
        (place / name).write_bytes(data)


def files_of(content: Content) -> dict[str, bytes]:
    """The files of one iteration, by name."""
    files = {f"__0_{number}.distcp": io.BytesIO() for number in range(2)}
    metadata = dcp.Metadata({}, None, {})
    assert metadata.storage_data is not None

    def add(index: dcp.MetadataIndex, key: str, value: Any) -> None:
        assert metadata.storage_data is not None
        data = content.raw_records[key] if key in content.raw_records else saved(value)
        name = f"__0_{len(metadata.storage_data) % len(files)}.distcp"
        metadata.storage_data[index] = _StorageInfo(name, files[name].tell(), len(data))
        files[name].write(data)

    for name, chunks in content.chunks.items():
        properties = dcp.TensorProperties(dtype=chunks[0][1].dtype)
        places = [dcp.ChunkStorageMetadata(torch.Size(offset), part.shape) for offset, part in chunks]
        size = torch.Size(content.shapes[name])
        metadata.state_dict_metadata[name] = dcp.TensorStorageMetadata(properties, size, places)
        for number, (offset, part) in enumerate(chunks):
            add(dcp.MetadataIndex(name, torch.Size(offset)), f"{name}/{number}", part)
    for name, value in content.objects.items():
        metadata.state_dict_metadata[name] = dcp.BytesStorageMetadata()
        add(dcp.MetadataIndex(name), name, [value])
    content.change_metadata(metadata)
    result = {name: file.getvalue() for name, file in files.items()}
    old, new = (text.encode() for text in content.replaced)
    result[".metadata"] = pickle.dumps(metadata).replace(old, new) if old else pickle.dumps(metadata)
    result["metadata.json"] = json.dumps(content.mark).encode()
    if content.common is not None:
        result["common.pt"] = saved(content.common)
    return result


def saved(value: Any) -> bytes:
    """What ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(value.clone() if isinstance(value, torch.Tensor) else value, buffer)
    return buffer.getvalue()
