"""Weights drawn from scratch: BERT's distribution, and the same numbers however the model is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hf_megatron import MegatronBertConfig, MegatronBertForPreTraining, MegatronBertModel
from tests.models.bert.reference import (
    HEADS,
    PLACEMENTS,
    TINY,
    Tensors,
    make_inputs,
    make_labels,
    our_class,
    stock_class,
    stock_config,
)
from tests.models.reference import (
    Pool,
    assert_all_equal,
    assert_replicas_equal,
    full_weights,
    layout,
    rank,
    run_at,
)
from tests.tiers import quick

PADDING_ROW = "embeddings.word_embeddings.weight"


def _config(placement: str = "pre", **changes: Any) -> MegatronBertConfig:
    return MegatronBertConfig(**{**TINY, "layernorm_placement": placement, **changes})


def _build(placement: str, head: str, tp_size: int, fsdp_size: int, seed: int | None) -> Tensors:
    """Full weights of a model built on ranks that were seeded differently."""
    torch.manual_seed(50 + rank())
    labels = {} if head == "ForQuestionAnswering" else {"num_labels": 3}
    config = _config(placement, tie_word_embeddings=False, **labels)
    model = our_class(head).from_config(config, distributed_config=layout(tp_size, fsdp_size), seed=seed)
    assert model.training
    if tp_size * fsdp_size > 1 and fsdp_size == 1:
        assert_replicas_equal(model)
    return full_weights(model)


_BUILT = [(2, 1, 3), (4, 1, None), (2, 2, 3), (1, 2, 3)]


@pytest.mark.parametrize(
    ("placement", "tp_size", "fsdp_size", "seed"),
    quick(
        ((placement, *built) for placement in PLACEMENTS for built in _BUILT), [("pre", 4, 1, None), ("post", 2, 2, 3)]
    ),
)
def test_weights_do_not_depend_on_the_layout(
    pool: Pool, placement: str, tp_size: int, fsdp_size: int, seed: int | None
) -> None:
    """Catches shards drawn rank by rank, and a bias or a padding row filled after the model was cut."""
    (expected,) = run_at(pool, 1, _build, placement, "ForPreTraining", 1, 1, seed)
    for weights in run_at(pool, tp_size * fsdp_size, _build, placement, "ForPreTraining", tp_size, fsdp_size, seed):
        assert_all_equal(weights, expected)


@pytest.mark.parametrize("head", [head for head in HEADS if head != "ForPreTraining"])
def test_heads_do_not_depend_on_the_layout(pool: Pool, head: str) -> None:
    """Catches a head's parameters drawn from another stream than the body's, or not at all."""
    (expected,) = run_at(pool, 1, _build, "post", head, 1, 1, 3)
    for weights in run_at(pool, 2, _build, "post", head, 2, 1, 3):
        assert_all_equal(weights, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("head", ["ForPreTraining", "ForTokenClassification"])
def test_distribution_is_that_of_bert(placement: str, head: str) -> None:
    """Catches a standard deviation of another layer or written into the code, and norms that do not begin as ones."""
    config = _config(placement, hidden_size=96, initializer_range=0.05, num_labels=50, type_vocab_size=50)
    weights = full_weights(our_class(head).from_config(config, seed=0))
    stock = stock_class(placement, head)(
        stock_config(placement, hidden_size=96, initializer_range=0.05, num_labels=50, type_vocab_size=50)
    )
    for name, reference in full_weights(stock).items():
        value = weights[name]
        if name.endswith(PADDING_ROW):
            assert not value[0].any()
            value, reference = value[1:], reference[1:]
        if reference.std() == 0 or reference.numel() == 1:
            assert torch.equal(value, reference), name
        else:
            std = reference.std().item()
            assert std == pytest.approx(0.05, rel=0.2), name
            assert value.std().item() == pytest.approx(0.05, rel=0.2 if value.numel() < 500 else 0.05), name


def test_every_parameter_has_a_stream_of_its_own() -> None:
    """Catches query, key and value, or layers, that begin as copies of each other."""
    weights = full_weights(MegatronBertForPreTraining.from_config(_config(tie_word_embeddings=False), seed=0))
    drawn = [tuple(value[1, :4].tolist()) for value in weights.values() if value.dim() == 2]
    assert len(set(drawn)) == len(drawn)


def test_the_body_is_the_same_under_every_head() -> None:
    """Catches parameter names, and so streams, that depend on the class the body is part of."""
    body = full_weights(MegatronBertModel.from_config(_config(), seed=1))
    for head in HEADS[1:]:
        weights = full_weights(our_class(head).from_config(_config(), seed=1).bert)
        assert_all_equal(weights, {name: body[name] for name in weights})
        assert body.keys() - weights.keys() <= {"pooler.dense.weight", "pooler.dense.bias"}


def _buffers(tp_size: int) -> dict[str, list[list[int]]]:
    model = MegatronBertForPreTraining.from_config(_config(), distributed_config=layout(tp_size))
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("tp_size", [1, 2])
def test_buffers_are_filled(pool: Pool, tp_size: int) -> None:
    """Catches positions and token types left as memory was, in a model that was built before it had any."""
    expected = {"position_ids": [list(range(32))], "token_type_ids": [[0] * 32]}
    for buffers in run_at(pool, tp_size, _buffers, tp_size):
        assert buffers == {f"bert.embeddings.{name}": value for name, value in expected.items()}


def _auto_from_config(auto_class: str, placement: str, tp_size: int) -> tuple[str, Tensors]:
    torch.manual_seed(60 + rank())
    model = getattr(transformers, auto_class).from_config(_config(placement), distributed_config=layout(tp_size))
    return type(model).__name__, full_weights(model)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_auto_classes_build_the_same(pool: Pool, placement: str) -> None:
    """Catches an Auto class that builds something else than the class, or does not take a layout."""
    (expected,) = run_at(pool, 1, _auto_from_config, "AutoModelForMaskedLM", placement, 1)
    assert expected[0] == "MegatronBertForMaskedLM"
    for class_name, weights in run_at(pool, 2, _auto_from_config, "AutoModelForMaskedLM", placement, 2):
        assert class_name == expected[0]
        assert_all_equal(weights, expected[1])


def _train_from_scratch(placement: str, head: str, tp_size: int) -> list[float]:
    model = our_class(head).from_config(
        _config(placement), distributed_config=layout(tp_size), dtype=torch.float64, seed=5
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inputs, labels = make_inputs(head), make_labels(head)
    losses = []
    for _ in range(5):
        loss = model(**inputs, **labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("placement", "head", "tp_size"),
    quick(
        [("pre", "ForPreTraining", 4), ("post", "ForPreTraining", 2), ("pre", "ForMaskedLM", 2)],
        [("post", "ForPreTraining", 2)],
    ),
)
def test_training_from_scratch_is_the_same_at_every_degree(pool: Pool, placement: str, head: str, tp_size: int) -> None:
    """Catches buffers left as memory was, and parameters that are not the ones the forward uses."""
    (expected,) = run_at(pool, 1, _train_from_scratch, placement, head, 1)
    assert expected[-1] < expected[0] - 1
    for losses in run_at(pool, tp_size, _train_from_scratch, placement, head, tp_size):
        assert losses == pytest.approx(expected, rel=1e-9)
