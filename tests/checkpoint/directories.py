"""Writes checkpoint directories in the formats that are read, from tensors small enough to compare one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_megatron.architectures import table_for
from hf_megatron.partition import Box

Tensors = dict[str, torch.Tensor]
Placed = dict[str, list[tuple[int, Box]]]  # name -> (index of the shard file, box) of every piece

# 131 rows divide by no degree.
CONFIG: dict[str, Any] = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "num_labels": 3}
CONFIG |= {"vocab_size": 131, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 4}
BERT_CONFIG: dict[str, Any] = {"model_type": "bert", "architectures": ["BertForPreTraining"], "num_labels": 3}
BERT_CONFIG |= {"vocab_size": 131, "max_position_embeddings": 16, "hidden_size": 8, "intermediate_size": 12}
BERT_CONFIG |= {"num_hidden_layers": 2, "num_attention_heads": 4}
SHARD_NAME = "shard-{:05d}-model-00001-of-00001.safetensors"


def model_tensors(config: Mapping[str, Any] = CONFIG, dtype: torch.dtype = torch.float32) -> Tensors:
    """Random tensors for every name in the state dict of the class that the config names."""
    table = table_for(config)
    generator = torch.Generator().manual_seed(0)
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for tensor in table.tensors(config, table.model_class(config["architectures"][0])).values()
    }


def write_config(directory: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_hub(directory: Path, tensors: Tensors, config: Mapping[str, Any] = CONFIG) -> Path:
    write_config(directory, config)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_pickle(directory: Path, tensors: Tensors, is_zip: bool = True) -> Path:
    torch.save(tensors, write_config(directory) / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    return directory


def write_hub_files(directory: Path, tensors: Tensors, suffix: str, num_files: int = 3) -> Path:
    """A Hub directory in several files with an index; ``suffix`` is ``safetensors`` or ``bin``."""
    write_config(directory)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for i in range(num_files):
        name = f"{stem}-{i + 1:05d}-of-{num_files:05d}.{suffix}"
        part = {key: tensors[key] for key in list(tensors)[i::num_files]}
        weight_map.update(dict.fromkeys(part, name))
        if suffix == "safetensors":
            save_file(part, directory / name, metadata={"format": "pt"})
        else:
            torch.save(part, directory / name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return directory


def tp_boxes(tensors: Tensors, tp_size: int, config: Mapping[str, Any] = CONFIG) -> Placed:
    """Boxes as ranks of one tensor-parallel group save them; replicated tensors are dealt out over the files."""
    placed: Placed = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        boxes = table_for(config).spec_of(name).stored_boxes(tuple(tensor.shape), tp_size)
        placed[name] = list(enumerate(boxes)) if len(boxes) > 1 else [(i % tp_size, boxes[0])]
    return placed


def write_tp(
    directory: Path, tensors: Tensors, tp_size: int, config: Mapping[str, Any] = CONFIG, placed: Placed | None = None
) -> Path:
    """A distributed checkpoint as transformers writes it."""
    write_config(directory, config)
    placed = tp_boxes(tensors, tp_size, config) if placed is None else placed
    for rank in range(tp_size):
        held = {name: box for name, pieces in placed.items() for index, box in pieces if index == rank}
        write_shard(
            directory / SHARD_NAME.format(rank + 1),
            {name: tensors[name][box.slices].contiguous() for name, box in held.items()},
            {name: box.offset for name, box in held.items()},
        )
    return directory


def write_shard(path: Path, tensors: Tensors, offsets: Mapping[str, Sequence[int]]) -> None:
    info = {name: {"saved_offsets": list(offset)} for name, offset in offsets.items()}
    metadata = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
    save_file(tensors, path, metadata=metadata)
