"""How each tensor of a model is cut over tensor-parallel ranks: the one table that everything else reads.

Pure: importing this package touches neither torch nor transformers, opens no file and knows no process group.
"""

from __future__ import annotations

from collections.abc import Mapping

from hf_megatron.errors import UnsupportedError
from hf_megatron.partition.gpt2 import GPT2
from hf_megatron.partition.spec import Box, FusedSplit, Replicated, Spec, Split, VocabSplit, chunk_range
from hf_megatron.partition.table import ModelClass, PartitionTable, Tensor, TensorRule
from hf_megatron.partition.tiling import tiling_error

__all__ = [
    "GPT2",
    "TABLES",
    "Box",
    "FusedSplit",
    "ModelClass",
    "PartitionTable",
    "Replicated",
    "Spec",
    "Split",
    "Tensor",
    "TensorRule",
    "VocabSplit",
    "chunk_range",
    "table_for",
    "tiling_error",
]

TABLES: tuple[PartitionTable, ...] = (GPT2,)


def table_for(config: Mapping[str, object]) -> PartitionTable:
    """The table for a config.json, by its ``model_type``, ours or the stock one.

    Raises:
        UnsupportedError: No table for this ``model_type``.
    """
    model_type = config.get("model_type")
    for table in TABLES:
        if model_type in (table.model_type, table.stock_model_type):
            return table
    known = ", ".join(name for table in TABLES for name in (table.stock_model_type, table.model_type))
    raise UnsupportedError(f"model_type {model_type!r} is not supported; known are {known}.")
