"""Megatron-LM's tensor parallelism for Hugging Face transformers.

Importing the package registers its models with transformers' Auto classes.

Source: Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism",
arXiv:1909.08053.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = [
    "MegatronBertConfig",
    "MegatronBertForMaskedLM",
    "MegatronBertForMultipleChoice",
    "MegatronBertForPreTraining",
    "MegatronBertForQuestionAnswering",
    "MegatronBertForSequenceClassification",
    "MegatronBertForTokenClassification",
    "MegatronBertModel",
    "MegatronGPT2Config",
    "MegatronGPT2ForQuestionAnswering",
    "MegatronGPT2ForSequenceClassification",
    "MegatronGPT2ForTokenClassification",
    "MegatronGPT2LMHeadModel",
    "MegatronGPT2Model",
    "MegatronTrainer",
    "__version__",
]

if TYPE_CHECKING:
    from hf_megatron.models.bert.configuration_bert import MegatronBertConfig
    from hf_megatron.models.bert.modeling_bert import MegatronBertModel
    from hf_megatron.models.bert.modeling_bert_heads import (
        MegatronBertForMaskedLM,
        MegatronBertForMultipleChoice,
        MegatronBertForPreTraining,
        MegatronBertForQuestionAnswering,
        MegatronBertForSequenceClassification,
        MegatronBertForTokenClassification,
    )
    from hf_megatron.models.gpt2.configuration_gpt2 import MegatronGPT2Config
    from hf_megatron.models.gpt2.modeling_gpt2 import MegatronGPT2Model
    from hf_megatron.models.gpt2.modeling_gpt2_heads import (
        MegatronGPT2ForQuestionAnswering,
        MegatronGPT2ForSequenceClassification,
        MegatronGPT2ForTokenClassification,
        MegatronGPT2LMHeadModel,
    )
    from hf_megatron.trainer import MegatronTrainer

# The command line needs the partition table in a fraction of the seconds that transformers takes to import; it sets
# this variable while it imports the package, and the commands that run models register themselves.
if os.environ.get("HF_MEGATRON_REGISTER", "1") != "0":
    from hf_megatron.models.registration import register

    register()


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import the classes when they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "hf_megatron.trainer" if name == "MegatronTrainer" else "hf_megatron.models"
    return getattr(import_module(module), name)
