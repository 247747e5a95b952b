"""transformers' common model tests, applied to the stock classes and to ours in the same way.

Runs in processes of its own, started by ``test_transformers_common``: ``transformers_tests`` is the ``tests`` folder of
transformers' source distribution, completed by the modules in ``stand_ins``. What the distribution leaves out is not
run: the tests of generation, of export, of pipelines and of FSDP.
"""

import unittest
from typing import Any, ClassVar
from unittest import mock

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers_tests import test_tensor_parallel_mixin as tensor_parallel
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

import hf_megatron
from hf_megatron.architectures import BERT_POST, BERT_PRE, GPT2, Architecture

# Only a sample of transformers' models takes these tests by default, to save time.
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
_reference_grad_shard = tensor_parallel._reference_grad_shard


def _stock(table: Architecture) -> tuple[Any, ...]:
    """The stock classes, the base model first: some of the tests look at the first class only."""
    pairs = sorted(table.classes, key=lambda pair: pair.has_prefix)
    return tuple(getattr(transformers, pair.stock) for pair in pairs)


def _ours(table: Architecture) -> tuple[Any, ...]:
    """Our classes in the same order. The tests look a class up by its name to know which labels it takes."""
    names = {pair.stock: pair.ours for pair in table.classes}
    for label, mapping in vars(modeling_auto).items():
        if label.endswith("_MAPPING_NAMES") and mapping.get(table.stock_model_type) in names:
            mapping[table.model_type] = names[mapping[table.stock_model_type]]
    return tuple(getattr(hf_megatron, names[model_class.__name__]) for model_class in _stock(table))


class ModelTester:
    """What the tests ask about the model under test."""

    batch_size, seq_length, vocab_size, num_choices, num_hidden_layers = 13, 7, 99, 4, 2
    is_training = True

    def __init__(self, language_model: Any, heads: int, head_dim: int, options: dict[str, Any]) -> None:
        self.causal_lm_class, self.options = language_model, options
        self.num_attention_heads, self.hidden_size = heads, heads * head_dim

    def get_config(self) -> Any:
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        return self.causal_lm_class.config_class(
            **{name: getattr(self, name) for name in names},
            **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        return self.get_config(), {
            "input_ids": ids_tensor(shape, self.vocab_size),
            "token_type_ids": ids_tensor(shape, 2),
        }


class CommonTests(ModelTesterMixin, TrainingTesterMixin, tensor_parallel.TensorParallelTesterMixin):
    """The mixins, with what our models need told."""

    model_tester = None  # so that the mixin's abstract property does not stand in the way of setUp
    test_can_init_all_missing_weights_before_2023 = True
    all_model_classes: tuple[Any, ...]
    heads: ClassVar[tuple[int, int]] = (3, 12)  # one of them lies on both of the two ranks
    options: ClassVar[dict[str, Any]] = {}

    def setUp(self) -> None:
        language_models = (c for c in self.all_model_classes if c.__name__.endswith(("LMHeadModel", "ForMaskedLM")))
        self.model_tester = ModelTester(next(language_models), *self.heads, self.options)

    def _get_tp_config(self, *args: Any, **kwargs: Any) -> Any:
        """Without dropout: the tests compare two training steps without setting the seed in between."""
        config = super()._get_tp_config(*args, **kwargs)
        for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        return config

    def test_tp_backward(self) -> None:
        with mock.patch.object(tensor_parallel, "_test_tp_backward_impl", _compare_gradients):
            super().test_tp_backward()


def _compare_gradients(rank: int, *args: Any) -> None:
    """transformers' comparison, on a rank, told how GPT-2's fused tensor is cut; it knows tensors of two blocks."""
    tensor_parallel._reference_grad_shard = _reference_part
    tensor_parallel._test_tp_backward_impl(rank, *args)


def _reference_part(name: str, grad: Any, local_grad: Any, rank: int, world_size: int, *args: Any) -> Any:
    """The part of the reference's gradient that a rank holds."""
    if name.endswith("attn.c_attn.weight"):
        return torch.cat([block.chunk(world_size, dim=1)[rank] for block in grad.chunk(3, dim=1)], dim=1)
    return _reference_grad_shard(name, grad, local_grad, rank, world_size, *args)


class StockGPT2(CommonTests, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = _stock(GPT2)


class OurGPT2(CommonTests, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = _ours(GPT2)


class BertTests(CommonTests):
    """BERT generates nothing, and its pre-training class takes a second kind of labels."""

    options: ClassVar[dict[str, Any]] = {"intermediate_size": 37}
    test_tp_generation = None

    def _prepare_for_class(self, inputs_dict: Any, model_class: Any, return_labels: bool = False) -> Any:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            inputs["next_sentence_label"] = inputs["labels"][:, 0]
        return inputs


class StockBertPost(BertTests, unittest.TestCase):
    all_model_classes = _stock(BERT_POST)


class OurBertPost(BertTests, unittest.TestCase):
    all_model_classes = _ours(BERT_POST)
    options: ClassVar[dict[str, Any]] = {**BertTests.options, **BERT_POST.own_config}


class StockBertPre(BertTests, unittest.TestCase):
    all_model_classes = _stock(BERT_PRE)
    heads = (4, 8)


class OurBertPre(BertTests, unittest.TestCase):
    all_model_classes = _ours(BERT_PRE)
    heads = (4, 8)
    options: ClassVar[dict[str, Any]] = {**BertTests.options, **BERT_PRE.own_config}
