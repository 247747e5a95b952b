"""Register our models with transformers' Auto classes, without affecting the stock ones.

Importing this takes seconds: transformers' models, and ours.
"""

from __future__ import annotations

from functools import cache

import transformers
from transformers import AutoTokenizer, BertTokenizerFast, GPT2TokenizerFast

from hf_megatron.models import parallel_style  # noqa: F401 (the style that the configurations' plans name)
from hf_megatron.models.bert import configuration_bert, modeling_bert, modeling_bert_heads
from hf_megatron.models.gpt2 import configuration_gpt2, modeling_gpt2, modeling_gpt2_heads

MODULES = (
    configuration_bert,
    modeling_bert,
    modeling_bert_heads,
    configuration_gpt2,
    modeling_gpt2,
    modeling_gpt2_heads,
)
_GPT2 = {
    "AutoModel": modeling_gpt2.MegatronGPT2Model,
    "AutoModelForCausalLM": modeling_gpt2_heads.MegatronGPT2LMHeadModel,
    "AutoModelForPreTraining": modeling_gpt2_heads.MegatronGPT2LMHeadModel,
    "AutoModelForQuestionAnswering": modeling_gpt2_heads.MegatronGPT2ForQuestionAnswering,
    "AutoModelForSequenceClassification": modeling_gpt2_heads.MegatronGPT2ForSequenceClassification,
    "AutoModelForTokenClassification": modeling_gpt2_heads.MegatronGPT2ForTokenClassification,
}
_BERT = {
    "AutoModel": modeling_bert.MegatronBertModel,
    "AutoModelForMaskedLM": modeling_bert_heads.MegatronBertForMaskedLM,
    "AutoModelForMultipleChoice": modeling_bert_heads.MegatronBertForMultipleChoice,
    "AutoModelForPreTraining": modeling_bert_heads.MegatronBertForPreTraining,
    "AutoModelForQuestionAnswering": modeling_bert_heads.MegatronBertForQuestionAnswering,
    "AutoModelForSequenceClassification": modeling_bert_heads.MegatronBertForSequenceClassification,
    "AutoModelForTokenClassification": modeling_bert_heads.MegatronBertForTokenClassification,
}
_MODELS = (
    (configuration_gpt2.MegatronGPT2Config, GPT2TokenizerFast, _GPT2),
    (configuration_bert.MegatronBertConfig, BertTokenizerFast, _BERT),
)


@cache
def register() -> None:
    """Register the models and tokenizers of our configurations, once."""
    for config_class, tokenizer_class, model_classes in _MODELS:
        AutoTokenizer.register(config_class, fast_tokenizer_class=tokenizer_class, exist_ok=True)
        for auto_class, model_class in model_classes.items():
            getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
