"""Additions to ``save_pretrained``: writing the stock config and removing stale shards."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from hf_megatron.architectures import PartitionTable
from hf_megatron.checkpoint.sharded import is_shard

_logger = logging.getLogger(__name__)

# File names of whole weights, in one file or several; optimizer states and adapters have other names.
_WHOLE_WEIGHTS = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)(\.index\.json)?"
)


def rewrite_config(directory: Path, table: PartitionTable, class_name: str, *, stock: bool) -> None:
    """Set the model type and class in ``config.json`` to the stock ones or ours; keep everything else.

    Args:
        directory: Where ``config.json`` lies.
        table: The architecture's partition table, which knows both names.
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
    """Remove shards of an earlier distributed save from a directory that now contains whole weights."""
    if any((directory / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        for path in directory.iterdir():
            if is_shard(path):
                path.unlink()


def is_not_weights(entry: Path) -> bool:
    """Whether an entry of a directory, such as a tokenizer, is kept when a distributed save replaces the model."""
    return not is_shard(entry) and _WHOLE_WEIGHTS.fullmatch(entry.name) is None


def reasons(error: CheckpointException) -> str:
    """Summarize a CheckpointException by rank; its own text is a nested traceback."""
    found = {f"{type(cause).__name__}: {cause}": rank for rank, (cause, _) in reversed(error.failures.items())}
    return "; ".join(f"rank {rank}: {reason}" for reason, rank in found.items())
