from __future__ import annotations

import unittest
from typing import Any

from transformers import (
    GPT2Config, GPT2ForQuestionAnswering, GPT2ForSequenceClassification, GPT2ForTokenClassification, GPT2LMHeadModel, GPT2Model,
)
from transformers.models.auto import modeling_auto
from transformers_tests import test_tensor_parallel_mixin
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

from hf_megatron.models.gpt2 import modeling_gpt2 as ours
from hf_megatron.models.gpt2.configuration_gpt2 import MegatronGPT2Config

for mapping, name in (
    ("MODEL_MAPPING_NAMES", "MegatronGPT2Model"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MegatronGPT2LMHeadModel"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "MegatronGPT2ForSequenceClassification"),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "MegatronGPT2ForTokenClassification"),
    ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "MegatronGPT2ForQuestionAnswering"),
):
    getattr(modeling_auto, mapping)["megatron_gpt2"] = name

test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class _Tester:
    batch_size, seq_length, vocab_size = 13, 7, 99
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    is_training = True

    def __init__(self, config_class: type[GPT2Config], causal_lm_class: Any) -> None:
        self.config_class, self.causal_lm_class = config_class, causal_lm_class

    def get_config(self) -> GPT2Config:
        return self.config_class(
            vocab_size=self.vocab_size, n_positions=512, n_embd=self.hidden_size, n_layer=2, n_head=4, n_inner=64, num_labels=3,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size),
            "token_type_ids": ids_tensor([self.batch_size, self.seq_length], 16),
        }


class _Common(
    ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, test_tensor_parallel_mixin.TensorParallelTesterMixin
):
    test_can_init_all_missing_weights_before_2023 = True
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = _Tester(self.all_model_classes[1].config_class, self.all_model_classes[1])


class StockTest(_Common, unittest.TestCase):
    all_model_classes = (GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification, GPT2ForQuestionAnswering)


class MegatronTest(_Common, unittest.TestCase):
    all_model_classes = (
        ours.MegatronGPT2Model, ours.MegatronGPT2LMHeadModel, ours.MegatronGPT2ForSequenceClassification,
        ours.MegatronGPT2ForTokenClassification, ours.MegatronGPT2ForQuestionAnswering,
    )
