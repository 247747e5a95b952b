"""What each architecture is: one table per architecture, which everything else reads.

Pure: importing this package touches neither torch nor transformers, opens no file and knows no process group.
"""

from __future__ import annotations

from hf_megatron.architectures.bert import BERT_POST, BERT_PRE
from hf_megatron.architectures.gpt2 import GPT2
from hf_megatron.architectures.table import (
    ERF_GELUS,
    TANH_GELUS,
    Architecture,
    Config,
    Field,
    MegatronLM,
    ModelClass,
    Tensor,
    TensorRule,
    is_same_function,
)
from hf_megatron.errors import UnsupportedError

__all__ = [
    "BERT_POST",
    "BERT_PRE",
    "ERF_GELUS",
    "GPT2",
    "TABLES",
    "TANH_GELUS",
    "Architecture",
    "Field",
    "MegatronLM",
    "ModelClass",
    "Tensor",
    "TensorRule",
    "is_same_function",
    "table_for",
]

TABLES: tuple[Architecture, ...] = (GPT2, BERT_PRE, BERT_POST)


def table_for(config: Config) -> Architecture:
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
