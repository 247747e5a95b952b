"""How each tensor of a model is cut over tensor-parallel ranks: the one table that everything else reads.

Pure: importing this package touches neither torch nor transformers, opens no file and knows no process group.
"""

from __future__ import annotations

from collections.abc import Mapping

from hf_megatron.errors import UnsupportedError
from hf_megatron.partition.bert import BERT_POST, BERT_PRE
from hf_megatron.partition.gpt2 import GPT2
from hf_megatron.partition.spec import Box, FusedSplit, Replicated, Spec, Split, VocabSplit, chunk_range
from hf_megatron.partition.table import ModelClass, PartitionTable, Tensor, TensorRule
from hf_megatron.partition.tiling import tiling_error

__all__ = [
    "BERT_POST",
    "BERT_PRE",
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

TABLES: tuple[PartitionTable, ...] = (GPT2, BERT_PRE, BERT_POST)


def table_for(config: Mapping[str, object]) -> PartitionTable:
    """The table for a config.json, by its ``model_type``, ours or the stock one, and what it says beyond.

    Raises:
        UnsupportedError: No table for this ``model_type``.
    """
    for table in TABLES:
        if table.is_for(config):
            return table
    known = dict.fromkeys(name for table in TABLES for name in (table.stock_model_type, table.model_type))
    own = {name: config.get(name) for table in TABLES for name in table.own_config}
    raise UnsupportedError(
        f"model_type {config.get('model_type')!r} with {own} is not supported; known are {', '.join(known)}."
    )
