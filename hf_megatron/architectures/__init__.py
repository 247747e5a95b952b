"""What each architecture is: one table per architecture, which everything else reads.

Pure: importing this package touches neither torch nor transformers, opens no file and knows no process group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_megatron.architectures.bert import BERT_POST, BERT_PRE
from hf_megatron.architectures.gpt2 import GPT2
from hf_megatron.architectures.table import Architecture, Field, ModelClass, Tensor
from hf_megatron.errors import UnsupportedError, shown

__all__ = ["BERT_POST", "BERT_PRE", "GPT2", "TABLES", "Architecture", "Field", "ModelClass", "Tensor", "table_for"]

TABLES: tuple[Architecture, ...] = (GPT2, BERT_PRE, BERT_POST)


def table_for(config: Mapping[str, Any]) -> Architecture:
    """The table for a config.json, by its ``model_type``, ours or the stock one, and what it says beyond.

    Raises:
        UnsupportedError: No table for this ``model_type``.
    """
    for table in TABLES:
        if table.is_for(config):
            return table
    known = dict.fromkeys(name for table in TABLES for name in (table.stock_model_type, table.model_type))
    own = ", ".join(f"{name}={shown(config.get(name))}" for name in {name for t in TABLES for name in t.own_config})
    raise UnsupportedError(
        f"model_type {shown(config.get('model_type'))} with {own} is not supported; known are {', '.join(known)}."
    )
