"""The model classes, imported when they are asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import transformers  # noqa: F401 (first: its import registers our configurations, which import this package)

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
]


def __getattr__(name: str) -> Any:
    """Import and register all classes when one is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    registration = import_module("hf_megatron.models.registration")
    registration.register()
    return next(getattr(module, name) for module in registration.MODULES if hasattr(module, name))
