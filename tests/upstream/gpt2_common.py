"""transformers' common model tests, applied to stock GPT-2 and to ours in the same way.

Runs in a process of its own, started by ``test_transformers_common``: ``transformers_tests`` is the ``tests`` folder of
transformers' source distribution, completed by the modules in ``stand_ins``. What the distribution leaves out is not
run: the tests of generation, of export, of pipelines and of FSDP.
"""

from __future__ import annotations

import unittest
from typing import Any
from unittest import mock

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers_tests import test_tensor_parallel_mixin as tensor_parallel
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

import hf_megatron
from hf_megatron.partition import GPT2

# The base model comes first: some of the tests look at the first class only.
_PAIRS = {pair.stock: pair.ours for pair in sorted(GPT2.classes, key=lambda pair: pair.has_prefix)}

# The tests look a class up by its name to know which labels it takes.
for _label, _names in vars(modeling_auto).items():
    if _label.endswith("_MAPPING_NAMES") and _names.get(GPT2.stock_model_type) in _PAIRS:
        _names[GPT2.model_type] = _PAIRS[_names[GPT2.stock_model_type]]

# Only a sample of transformers' models takes these tests by default, to save time.
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
_reference_grad_shard = tensor_parallel._reference_grad_shard


class GPT2Tester:
    """What the tests ask about the model under test."""

    batch_size, seq_length, vocab_size = 13, 7, 99
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    is_training = True

    def __init__(self, causal_lm_class: Any) -> None:
        self.causal_lm_class = causal_lm_class

    def get_config(self) -> Any:
        return self.causal_lm_class.config_class(
            vocab_size=self.vocab_size,
            n_positions=64,
            n_embd=self.hidden_size,
            n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            num_labels=3,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        # GPT-2 looks token types up among the words; few, so that a vocabulary that a test shrinks still has them.
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "token_type_ids": ids_tensor(shape, 4)}
        return self.get_config(), inputs


class GPT2CommonTests(
    ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, tensor_parallel.TensorParallelTesterMixin
):
    """The mixins, with what GPT-2 needs told."""

    model_tester = None  # so that the mixin's abstract property does not stand in the way of setUp
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = GPT2Tester(self.all_model_classes[1])

    def _get_tp_config(self, *args: Any, **kwargs: Any) -> Any:
        """Without dropout: the tests compare two training steps without setting the seed in between."""
        config = super()._get_tp_config(*args, **kwargs)
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
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


class StockTest(GPT2CommonTests, unittest.TestCase):
    all_model_classes = tuple(getattr(transformers, name) for name in _PAIRS)


class MegatronTest(GPT2CommonTests, unittest.TestCase):
    all_model_classes = tuple(getattr(hf_megatron, name) for name in _PAIRS.values())
