"""Strategies for whole directories: checkpoints of every format, in which files, places or the model itself are wrong.

A directory is a dictionary from relative paths to bytes, or to a :class:`Special` for what is no ordinary file.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.checkpoint.directories import (
    BERT_CONFIG,
    model_tensors,
    write_hub,
    write_hub_files,
    write_pickle,
    write_tp,
)
from tests.conversion.megatron_lm.generator import Variant, content_of, make_weights

SECRET = b"of another directory, and of no checkpoint"
SIDE_FILES: dict[str, bytes] = {
    "generation_config.json": b'{"eos_token_id": 0}',
    "tokenizer.json": json.dumps(
        {
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 130}, "merges": []},
            "added_tokens": [{"id": 5, "content": "c"}],
        }
    ).encode(),
    "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}',
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "LICENSE": b"Free.\n",
}
VARIANTS = {
    "megatron": Variant(layers=1),
    "megatron-pipeline": Variant(pp=2, version=3.0),
    "megatron-core": Variant(names="core", tp=1, layers=1),
    "megatron-bert": Variant(kind="bert", is_zip=False, layers=1),
    "megatron-old": Variant(version=None, names="flat", tp=1, layers=1, has_arguments=False, is_zip=False),
}


@dataclass(frozen=True)
class Special:
    """What stands in the place of a file: a FIFO, a directory, a link to ``target``, or ``size`` zeros."""

    kind: str
    target: str = ""
    size: int = 0


Files = dict[str, bytes | Special]


def write(files: Files, directory: Path) -> None:
    """Write a directory; what cannot be written, such as a file in the place of a directory, is left out."""
    directory.mkdir()
    for name, content in files.items():
        path = directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content.kind == "fifo":
                os.mkfifo(path)
            elif content.kind == "directory":
                path.mkdir()
            elif content.kind == "link":
                path.symlink_to(content.target)
            else:
                with path.open("wb") as file:
                    file.truncate(content.size)
        except (OSError, ValueError):
            continue


def read(directory: Path) -> Files:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@cache
def hub_seeds() -> dict[str, Files]:
    """Undamaged directories of the formats that are transformers' own."""
    with TemporaryDirectory() as root:
        base, gpt2 = Path(root), model_tensors()
        write_hub(base / "hub", gpt2)
        write_hub(base / "hub-bert", model_tensors(BERT_CONFIG), BERT_CONFIG)
        write_pickle(base / "bin", gpt2)
        write_pickle(base / "bin-legacy", gpt2, is_zip=False)
        write_hub_files(base / "hub-files", gpt2, "safetensors")
        write_hub_files(base / "bin-files", gpt2, "bin")
        write_tp(base / "tp", gpt2, 2)
        write_tp(base / "tp-bert", model_tensors(BERT_CONFIG), 2, BERT_CONFIG)
        return {path.name: {**read(path), **SIDE_FILES} for path in sorted(base.iterdir())}


@cache
def contents(name: str) -> dict[str, dict[str, Any]]:
    """The ranks' objects of a Megatron-LM checkpoint, by directory."""
    variant, found = VARIANTS[name], {}
    weights = make_weights(variant)
    for tp in range(variant.tp):
        for pp in range(variant.pp):
            rank = f"mp_rank_{tp:02d}" if variant.pp == 1 else f"mp_rank_{tp:02d}_{pp:03d}"
            found[rank] = content_of(variant, weights, tp, pp)
    return found


def torch_bytes(content: Any, *, is_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


@cache
def megatron_seed(name: str) -> Files:
    """An undamaged Megatron-LM checkpoint."""
    ranks = {rank: torch_bytes(content, is_zip=VARIANTS[name].is_zip) for rank, content in contents(name).items()}
    files: Files = {f"iter_0001000/{rank}/model_optim_rng.pt": content for rank, content in ranks.items()}
    return {**files, "latest_checkpointed_iteration.txt": b"1000"}
