"""Weights drawn from scratch: GPT-2's distribution, and the same numbers however the model is cut."""

from __future__ import annotations

from math import sqrt
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_megatron import (
    MegatronGPT2Config,
    MegatronGPT2ForSequenceClassification,
    MegatronGPT2LMHeadModel,
    MegatronGPT2Model,
)
from hf_megatron.models import initialization
from tests.models.reference import (
    TINY,
    Pool,
    assert_all_equal,
    assert_replicas_equal,
    full_weights,
    layout,
    rank,
    run_at,
)
from tests.tiers import quick

Weights = dict[str, torch.Tensor]


def _config(**changes: Any) -> MegatronGPT2Config:
    return MegatronGPT2Config(**{**TINY, **changes})


def _build(
    tp_size: int, fsdp_size: int, seed: int | None = 3, model_class: type[PreTrainedModel] = MegatronGPT2LMHeadModel
) -> Weights:
    """Full weights of a model built on ranks that were seeded differently."""
    torch.manual_seed(50 + rank())
    config = _config(tie_word_embeddings=False, num_labels=3)
    model = model_class.from_config(config, distributed_config=layout(tp_size, fsdp_size), seed=seed)
    assert model.training
    assert model.device.type == "cpu"
    if tp_size * fsdp_size > 1 and fsdp_size == 1:
        assert_replicas_equal(model)
    return full_weights(model)


@pytest.mark.parametrize(
    ("tp_size", "fsdp_size", "seed"),
    quick(
        ((*at, seed) for at in ((2, 1), (4, 1), (2, 2), (1, 2)) for seed in (3, None)),
        [(4, 1, 3), (2, 1, None), (2, 2, 3)],
    ),
)
def test_weights_do_not_depend_on_the_layout(pool: Pool, tp_size: int, fsdp_size: int, seed: int | None) -> None:
    """Catches shards drawn rank by rank, from a stream whose position depends on what was drawn before."""
    (expected,) = run_at(pool, 1, _build, 1, 1, seed)
    for weights in run_at(pool, tp_size * fsdp_size, _build, tp_size, fsdp_size, seed):
        assert_all_equal(weights, expected)


def test_heads_do_not_depend_on_the_layout(pool: Pool) -> None:
    """Catches a head's parameters drawn from another stream than the body's, or not at all."""
    (expected,) = run_at(pool, 1, _build, 1, 1, 3, MegatronGPT2ForSequenceClassification)
    for weights in run_at(pool, 2, _build, 2, 1, 3, MegatronGPT2ForSequenceClassification):
        assert_all_equal(weights, expected)


def test_distribution_is_that_of_gpt2() -> None:
    """Catches residual projections that are not scaled by 1/sqrt(2 * layers), and weights left as memory was."""
    config = _config(n_embd=96, n_layer=4, tie_word_embeddings=False)
    for name, value in full_weights(MegatronGPT2LMHeadModel.from_config(config, seed=0)).items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif ".ln_" in name:
            assert value.eq(1).all(), name
        else:
            std = 0.02 / sqrt(2 * 4) if name.endswith("c_proj.weight") else 0.02
            assert value.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(value.mean().item()) < 4 * std / sqrt(value.numel()), name


def test_initializer_range_is_honoured() -> None:
    """Catches a standard deviation written into the code."""
    model = MegatronGPT2LMHeadModel.from_config(_config(initializer_range=0.5), seed=0)
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_every_parameter_has_a_stream_of_its_own() -> None:
    """Catches layers, or tensors of one shape, that begin as copies of each other."""
    weights = full_weights(MegatronGPT2LMHeadModel.from_config(_config(tie_word_embeddings=False), seed=0))
    drawn = [tuple(value.flatten()[:4].tolist()) for name, value in weights.items() if value.dim() == 2]
    assert len(set(drawn)) == len(drawn)
    assert {value != 0 for values in drawn for value in values} == {True}


def test_seeds() -> None:
    """Catches a seed that is ignored, and building a model that disturbs the caller's random numbers."""
    torch.manual_seed(11)
    by_constructor = full_weights(MegatronGPT2LMHeadModel(_config()))
    state = torch.get_rng_state()
    by_default = full_weights(MegatronGPT2LMHeadModel.from_config(_config()))
    by_seed = full_weights(MegatronGPT2LMHeadModel.from_config(_config(), seed=11))
    another = full_weights(MegatronGPT2LMHeadModel.from_config(_config(), seed=12))
    assert torch.equal(torch.get_rng_state(), state)
    assert_all_equal(by_default, by_seed)
    assert_all_equal(by_constructor, by_seed)
    assert not torch.equal(another["transformer.wte.weight"], by_seed["transformer.wte.weight"])


def test_the_body_is_the_same_under_every_head() -> None:
    """Catches parameter names, and so streams, that depend on the class the body is part of."""
    body = full_weights(MegatronGPT2Model.from_config(_config(), seed=1))
    model = MegatronGPT2LMHeadModel.from_config(_config(), seed=1)
    assert_all_equal(full_weights(model.transformer), body)


def test_dtype_and_attention_are_taken() -> None:
    """Catches arguments lost on the way, and a dtype that changes the numbers drawn."""
    model = MegatronGPT2LMHeadModel.from_config(_config(), seed=1, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    full_precision = full_weights(MegatronGPT2LMHeadModel.from_config(_config(), seed=1))
    assert_all_equal(full_weights(model), {name: value.bfloat16() for name, value in full_precision.items()})


def test_slices_come_out_of_the_blocks_they_lie_in() -> None:
    """Catches rows lost or doubled where a slice crosses from one drawn block into the next."""
    with mock.patch.object(initialization, "_BLOCK_ELEMENTS", 5 * 7):  # 5 rows of 7
        weight = torch.empty(23, 7)
        initialization.fill_normal(weight, 1.0, 0, "name")
        drawn = initialization._DrawnTensor((23, 7), 1.0, 0, "name", None)
        for rows in (slice(0, 23), slice(3, 12), slice(5, 10), slice(21, 23), slice(4, 4)):
            assert torch.equal(drawn[rows, slice(2, 6)], weight[rows, 2:6])
        assert torch.equal(drawn[...], weight)
    assert weight.unique().numel() == weight.numel()


def _auto_from_config(tp_size: int) -> tuple[str, Weights]:
    torch.manual_seed(60 + rank())
    model = AutoModelForCausalLM.from_config(_config(), distributed_config=layout(tp_size), dtype=torch.float64)
    assert (model.tp_size or 1) == tp_size
    assert model.config.name_or_path == ""
    return type(model).__name__, full_weights(model)


def test_auto_class_builds_the_same(pool: Pool) -> None:
    """Catches `AutoModelForCausalLM.from_config(config, distributed_config=...)`, which stock models refuse."""
    (expected,) = run_at(pool, 1, _auto_from_config, 1)
    assert expected[0] == "MegatronGPT2LMHeadModel"
    for class_name, weights in run_at(pool, 2, _auto_from_config, 2):
        assert class_name == expected[0]
        assert_all_equal(weights, expected[1])


def _train_from_scratch(tp_size: int) -> list[float]:
    torch.manual_seed(4)
    model = MegatronGPT2LMHeadModel.from_config(
        _config(resid_pdrop=0.1, attn_pdrop=0.1), distributed_config=layout(tp_size), dtype=torch.float64, seed=5
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = torch.arange(1, 41).reshape(2, 20)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_from_scratch_is_the_same_at_every_degree(pool: Pool) -> None:
    """Catches parameters that the forward does not use, and building that draws from the stream of dropout."""
    (expected,) = run_at(pool, 1, _train_from_scratch, 1)
    assert expected[-1] < expected[0] - 0.5
    for losses in run_at(pool, 2, _train_from_scratch, 2):
        assert losses == pytest.approx(expected, rel=1e-9)
