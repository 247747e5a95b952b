"""The model classes, and their registration with transformers' Auto classes."""

import transformers  # noqa: F401 (first: its import registers our models, which import this package)

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
