"""Make transformers' Auto classes know our models, and leave everything about the stock ones as it is."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2TokenizerFast,
)

from hf_megatron.models.gpt2.configuration_gpt2 import MegatronGPT2Config
from hf_megatron.models.gpt2.modeling_gpt2 import (
    MegatronGPT2ForQuestionAnswering,
    MegatronGPT2ForSequenceClassification,
    MegatronGPT2ForTokenClassification,
    MegatronGPT2LMHeadModel,
    MegatronGPT2Model,
)

__all__ = ["register"]


def register() -> None:
    """Register ``megatron_gpt2``; safe to call more than once."""
    AutoConfig.register(MegatronGPT2Config.model_type, MegatronGPT2Config, exist_ok=True)
    for auto_class, model_class in (
        (AutoModel, MegatronGPT2Model),
        (AutoModelForCausalLM, MegatronGPT2LMHeadModel),
        (AutoModelForSequenceClassification, MegatronGPT2ForSequenceClassification),
        (AutoModelForTokenClassification, MegatronGPT2ForTokenClassification),
        (AutoModelForQuestionAnswering, MegatronGPT2ForQuestionAnswering),
    ):
        auto_class.register(MegatronGPT2Config, model_class, exist_ok=True)
    AutoTokenizer.register(MegatronGPT2Config, fast_tokenizer_class=GPT2TokenizerFast, exist_ok=True)
