"""What ``save_pretrained`` does here beyond transformers: the stock config, and distributed saves that replace whole.

A distributed save writes one file per rank. Written into a directory that holds another one, the old files would stay
among the new; so it goes to a fresh directory beside the destination, which takes its place when it is complete.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from hf_megatron.architectures import Architecture
from hf_megatron.checkpoint.sharded import is_shard

_logger = logging.getLogger(__name__)

# A model's weights in one piece or several; an optimizer's state and adapters have names of their own.
_WHOLE_WEIGHTS = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)(\.index\.json)?"
)


def rewrite_config(directory: Path, table: Architecture, class_name: str, *, stock: bool) -> None:
    """Make ``config.json`` name the stock classes, or ours; everything else in it stays.

    Args:
        directory: Where ``config.json`` lies.
        table: The architecture, which knows both names.
        class_name: The saved model's class, stock's name or ours.
        stock: Whether to write transformers' ``model_type`` and class, so that the directory loads without this
            package.
    """
    path = directory / "config.json"
    config = table.config_of(json.loads(path.read_text(encoding="utf-8")), table.model_class(class_name), stock=stock)
    mismatch = table.stock_mismatch(config) if stock else None
    if mismatch is not None:
        _logger.warning(mismatch)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def remove_shards(directory: Path) -> None:
    """Remove what an earlier distributed save left in a directory, if that holds the weights in one piece now."""
    if any((directory / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        for path in directory.iterdir():
            if is_shard(path):
                path.unlink()


def swap_into_place(fresh: Path, destination: Path) -> None:
    """Put a complete checkpoint directory where ``destination`` is, keeping the other files that lie there.

    Files of the old checkpoint's weights go, everything else (tokenizer, optimizer) moves over unless the new directory
    has its own. Until the new directory is in place the old one is not touched.
    """
    if not destination.exists():
        fresh.rename(destination)
        return
    old = destination.with_name(f".{destination.name}.old-{os.getpid()}")
    destination.rename(old)
    fresh.rename(destination)
    for entry in old.iterdir():
        is_weights = is_shard(entry) or _WHOLE_WEIGHTS.fullmatch(entry.name) is not None
        if not is_weights and not (destination / entry.name).exists():
            entry.rename(destination / entry.name)
    shutil.rmtree(old)


def reasons(error: CheckpointException) -> str:
    """What went wrong on which ranks; the exception itself is a nested traceback, and a BaseException."""
    found = {f"{type(cause).__name__}: {cause}": rank for rank, (cause, _) in reversed(error.failures.items())}
    return "; ".join(f"rank {rank}: {reason}" for reason, rank in found.items())
