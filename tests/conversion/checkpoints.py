"""Checkpoint directories to convert, and ways to look into them that do not go through the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_megatron_conversion import convert

# 12 heads divide by 2, 3 and 4; 131 words by none of them.
SIZES: dict[str, Any] = {"vocab_size": 131, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 12}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

BERT_SIZES: dict[str, Any] = {"vocab_size": 131, "max_position_embeddings": 32, "hidden_size": 48}
BERT_SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 96}

Entry = tuple[str, tuple[int, ...], tuple[int, ...], str, bytes]


def save_stock(
    directory: Path,
    *,
    model_class: type[PreTrainedModel] = GPT2LMHeadModel,
    max_shard_size: str = "50GB",
    **config: Any,
) -> Path:
    """Save a stock model whose tensors all differ, biases and norms included."""
    sizes = SIZES if model_class.config_class is GPT2Config else BERT_SIZES
    model = model_class(model_class.config_class(**{**sizes, **config}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def write_hub(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """A hub directory of these tensors and this config.json, or what of one that is there already they replace."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """What ``write_hub`` wrote."""
    return load_file(directory / "model.safetensors")


def there_and_back(source: Path, directory: Path, *degrees: int, verify: bool = False) -> list[Path]:
    """Convert to tp directories of these degrees, one after the other, and then to a hub directory: all of them."""
    steps = [source]
    for number, tp_size in enumerate(degrees):
        steps.append(directory / f"tp{tp_size}-{number}")
        convert(steps[-2], steps[-1], to="tp", tp_size=tp_size, verify=verify)
    convert(steps[-1], directory / "hub", to="hub", verify=verify)
    return [*steps[1:], directory / "hub"]


def hub_bytes(directory: Path) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every tensor of a hub directory."""
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: (str(tensor.dtype), _bytes(tensor)) for name, tensor in tensors.items()}


def tp_entries(directory: Path) -> set[Entry]:
    """(name, offset, shape, dtype, bytes) of everything that the shards of a tp directory hold."""
    entries = set()
    for file in directory.glob("shard-*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            assert (metadata["format"], metadata["DCP_VERSION"]) == ("pt", "1.0")
            info = json.loads(metadata["DCP_SHARDING_INFO"])
            assert set(info) == set(opened.keys())
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                tensor = opened.get_tensor(name)
                offset = tuple(info[name]["saved_offsets"])
                entries.add((name, offset, tuple(tensor.shape), str(tensor.dtype), _bytes(tensor)))
    return entries


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def flipped(path: Path, position: int = -200) -> bytes:
    """A file's bytes with one bit changed."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    return bytes(data)


def directory_bytes(directory: Path) -> dict[str, bytes]:
    """Content of every file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
