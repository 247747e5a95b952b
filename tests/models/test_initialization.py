"""Weights drawn from scratch: the stock distribution, and the same numbers however the model is cut."""

from functools import partial
from math import sqrt
from typing import Any
from unittest import mock

import pytest
import torch

from hf_megatron.models import initialization
from tests.models.architectures import ARCHITECTURES, GPT2, POST, PRE, ModelCase
from tests.models.reference import Pool, Tensors, assert_all_equal, assert_replicas_equal, full_weights, rank, run_at
from tests.tiers import quick


def _build(case: ModelCase, head: str, seed: int | None, tp_size: int, fsdp_size: int = 1) -> Tensors:
    """Full weights of a model built on ranks that were seeded differently."""
    torch.manual_seed(50 + rank())
    labels = {} if head == "ForQuestionAnswering" else {"num_labels": 3}
    config = case.config(tie_word_embeddings=False, **labels)
    model = case.build(tp_size, fsdp_size, head, config=config, seed=seed)
    assert model.training
    assert model.device.type == "cpu"
    if fsdp_size == 1 and tp_size > 1:
        assert_replicas_equal(model)
    for name, buffer in model.named_buffers():  # not as memory was
        expected = torch.arange(32) if name.endswith("position_ids") else torch.zeros(32).long()
        assert torch.equal(buffer[0], expected), name
    return full_weights(model)


@pytest.mark.parametrize(
    ("case", "head", "tp_size", "fsdp_size", "seed"),
    [
        *quick(
            (
                (case, case.heads[0], *at, seed)
                for case in ARCHITECTURES
                for at in ((2, 1), (4, 1), (2, 2), (1, 2))
                for seed in (3, None)
            ),
            [
                *((GPT2, GPT2.heads[0], *at) for at in ((4, 1, 3), (2, 1, None), (2, 2, 3))),
                *((PRE, PRE.heads[0], 4, 1, None), (POST, POST.heads[0], 2, 2, 3)),
            ],
        ),
        *((case, head, 2, 1, 3) for case in (GPT2, POST) for head in case.heads[1:]),
    ],
)
def test_weights_do_not_depend_on_the_layout(
    pool: Pool, case: ModelCase, head: str, tp_size: int, fsdp_size: int, seed: int | None
) -> None:
    """Catches shards drawn rank by rank, from a stream that depends on what was drawn before, or filled once cut."""
    expected = _build(case, head, seed, 1)
    for weights in run_at(pool, tp_size * fsdp_size, _build, case, head, seed, tp_size, fsdp_size):
        assert_all_equal(weights, expected)


@pytest.mark.parametrize("head", ["main", "ForTokenClassification"])
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_distribution_is_that_of_stock(case: ModelCase, head: str) -> None:
    """Catches another standard deviation, also of the residual projections, and norms that do not begin as ones."""
    name_of_head = case.heads[0] if head == "main" else head
    changes: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 4, "initializer_range": 0.05, "num_labels": 50}
    drawn = full_weights(case.build(head=name_of_head, config=case.config(**changes), seed=0))
    stock = full_weights(case.stock(name_of_head)(case.stock_config(**changes)))
    for name, value in drawn.items():
        reference = stock[name]
        if not reference[0].any() and reference.any():  # the row of the padding token
            assert not value[0].any()
            value, reference = value[1:], reference[1:]
        if reference.numel() == 1 or reference.std() == 0:
            assert torch.equal(value, reference), name
            continue
        assert value.std().item() == pytest.approx(reference.std().item(), rel=0.25 if value.numel() < 500 else 0.05)
        assert abs(value.mean().item()) < 4 * value.std() / sqrt(value.numel()), name


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_every_parameter_has_a_stream_of_its_own(case: ModelCase) -> None:
    """Catches layers, or tensors of one shape, that begin as copies of each other, and weights left as memory was."""
    weights = full_weights(case.build(config=case.config(tie_word_embeddings=False), seed=0))
    drawn = [tuple(value[1, :4].tolist()) for value in weights.values() if value.dim() == 2]
    assert len(set(drawn)) == len(drawn)
    assert all(value != 0 for values in drawn for value in values)


def test_seeds() -> None:
    """Catches a seed that is ignored, and building a model that disturbs the caller's random numbers."""
    build = partial(GPT2.build, config=GPT2.config())
    torch.manual_seed(11)
    by_constructor = full_weights(GPT2.ours()(GPT2.config()))
    state = torch.get_rng_state()
    by_default, by_seed, another = (full_weights(build(seed=seed)) for seed in (None, 11, 12))
    assert torch.equal(torch.get_rng_state(), state)
    assert_all_equal(by_default, by_seed)
    assert_all_equal(by_constructor, by_seed)
    assert not torch.equal(another[GPT2.embedding], by_seed[GPT2.embedding])


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_the_body_is_the_same_under_every_head(case: ModelCase) -> None:
    """Catches parameter names, and so streams, that depend on the class the body is part of."""
    body = full_weights(case.build(head="Model", config=case.config(), seed=1))
    for head in case.heads:
        weights = full_weights(case.build(head=head, config=case.config(), seed=1).base_model)
        assert_all_equal(weights, {name: body[name] for name in weights})
        assert body.keys() - weights.keys() <= {"pooler.dense.weight", "pooler.dense.bias"}


def test_dtype_and_attention_are_taken() -> None:
    """Catches arguments lost on the way, and a dtype that changes the numbers drawn."""
    build = partial(GPT2.build, config=GPT2.config(), seed=1)
    model = build(dtype=torch.bfloat16, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert_all_equal(full_weights(model), {name: value.bfloat16() for name, value in full_weights(build()).items()})


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
