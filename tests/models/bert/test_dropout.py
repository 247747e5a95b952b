"""Dropout: the same masks at every degree, so that training with it can be compared and repeated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron import MegatronBertForPreTraining, MegatronBertModel
from tests.models.bert.reference import (
    PLACEMENTS,
    Tensors,
    gradients,
    make_inputs,
    make_labels,
    our_class,
    outputs_of,
    save_stock_bert,
    stock_class,
)
from tests.models.reference import (
    Pool,
    assert_agrees,
    assert_all_agree,
    assert_all_equal,
    assert_same_on_all_ranks,
    layout,
    rank,
    run_at,
)
from tests.tiers import quick

P_ATTENTION, P_HIDDEN = 0.3, 0.1


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stock model with dropout everywhere, for each placement."""
    dropout = {"attention_probs_dropout_prob": P_ATTENTION, "hidden_dropout_prob": P_HIDDEN}
    return {
        placement: save_stock_bert(tmp_path_factory.mktemp("dropout"), placement, "ForPreTraining", **dropout)
        for placement in PLACEMENTS
    }


@dataclass
class _Steps:
    """Two training steps: their losses, the sum of their gradients, and the random state they leave behind."""

    losses: torch.Tensor
    gradients: Tensors
    random_state: torch.Tensor


def _train(directory: Path, tp_size: int, attention: str, checkpointing: dict[str, Any] | None = None) -> _Steps:
    torch.manual_seed(1 + rank())  # loading puts the ranks in step with rank 0
    model = MegatronBertForPreTraining.from_pretrained(
        directory, dtype=torch.float64, attn_implementation=attention, distributed_config=layout(tp_size)
    ).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)
    for module in (model.bert.embeddings, *model.bert.encoder.layer):
        module.register_forward_hook(
            lambda module, _, output: assert_same_on_all_ranks(f"output of {type(module).__name__}", output)
        )
    losses = []
    for padding in ("right", "left"):
        loss = model(**make_inputs("ForPreTraining", padding), **make_labels("ForPreTraining", padding)).loss
        loss.backward()
        losses.append(loss.detach())
    assert_same_on_all_ranks("random state", torch.get_rng_state())
    return _Steps(torch.stack(losses), gradients(model), torch.get_rng_state())


@pytest.mark.parametrize(
    ("placement", "attention", "tp_size"),
    quick(itertools.product(PLACEMENTS, ("eager", "sdpa"), (2, 4)), [("pre", "eager", 4), ("post", "sdpa", 2)]),
)
def test_training_does_not_depend_on_the_degree(
    pool: Pool, directories: dict[str, Path], placement: str, attention: str, tp_size: int
) -> None:
    """Catches masks that depend on which rank a head lies on, and replicated activations that drop differently."""
    (expected,) = run_at(pool, 1, _train, directories[placement], 1, attention)
    for steps in run_at(pool, tp_size, _train, directories[placement], tp_size, attention):
        assert_agrees("losses", steps.losses, expected.losses)
        assert_all_agree("gradient", steps.gradients, expected.gradients)
        assert torch.equal(steps.random_state, expected.random_state)


@pytest.mark.parametrize(
    ("tp_size", "placement", "attention"),
    quick(
        itertools.product((1, 2), PLACEMENTS, ("eager", "sdpa")),
        [(1, "post", "eager"), (2, "pre", "eager")],
    ),
)
def test_checkpointing_changes_nothing(
    pool: Pool, directories: dict[str, Path], tp_size: int, placement: str, attention: str
) -> None:
    """Catches a recomputation that drops other elements than the forward pass did: silently wrong gradients."""
    expected = run_at(pool, tp_size, _train, directories[placement], tp_size, attention)[0]
    for reentrant, recompute in itertools.product((False, True), ("full", "selective")):
        options = {"use_reentrant": reentrant, "recompute": recompute}
        for steps in run_at(pool, tp_size, _train, directories[placement], tp_size, attention, options):
            assert torch.equal(steps.losses, expected.losses)
            assert_all_equal(steps.gradients, expected.gradients)
            assert torch.equal(steps.random_state, expected.random_state)


def _dropped(directory: Path, tp_size: int) -> torch.Tensor:
    """Whether each attention probability [L, B, N, S, S] was dropped in training."""
    model = MegatronBertModel.from_pretrained(
        directory, attn_implementation="eager", distributed_config=layout(tp_size)
    ).train()
    torch.manual_seed(2)
    outputs = model(**make_inputs("Model", "none"), output_attentions=True)
    return torch.stack(outputs.attentions).detach() == 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_head_has_a_mask_of_its_own(pool: Pool, directories: dict[str, Path], placement: str) -> None:
    """Catches ranks whose heads are masked alike, and another probability than the configured one."""
    (expected,) = run_at(pool, 1, _dropped, directories[placement], 1)
    for is_dropped in run_at(pool, 2, _dropped, directories[placement], 2):
        assert torch.equal(is_dropped, expected)
    assert expected.double().mean().item() == pytest.approx(P_ATTENTION, abs=0.03)
    patterns = {tuple(pattern) for pattern in expected.flatten(0, 2).flatten(1).int().tolist()}
    assert len(patterns) == 2 * 3 * 12


def _drop_everything(placement: str, head: str, directory: Path, tp_size: int) -> None:
    """A probability of one leaves nothing to chance: what is left is what the stock class leaves."""
    load: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    stock = stock_class(placement, head).from_pretrained(directory, **load).train()
    ours = our_class(head).from_pretrained(directory, distributed_config=layout(tp_size), **load).train()
    inputs = make_inputs(head)
    valid = inputs["attention_mask"].bool().flatten(0, -2)
    for p_embeddings in (0.0, 1.0):  # with 1.0 nothing is left to see further on
        for model in (stock, ours):
            model.base_model.embeddings.dropout.p = p_embeddings
        expected, actual = (model(**inputs, output_hidden_states=True) for model in (stock, ours))
        torch.testing.assert_close(dict(outputs_of(actual, valid)), dict(outputs_of(expected, valid)))


@pytest.mark.parametrize(
    ("head", "placement"),
    quick(
        itertools.product(
            ("Model", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification"), PLACEMENTS
        ),
        [
            ("Model", "pre"),
            ("Model", "post"),
            ("ForSequenceClassification", "pre"),
            ("ForMultipleChoice", "post"),
            ("ForTokenClassification", "post"),
        ],
    ),
)
def test_dropout_stands_where_stock_has_it(pool: Pool, tmp_path: Path, placement: str, head: str) -> None:
    """Catches dropout that is missing, applied twice, or on the wrong side of a residual or a norm."""
    save_stock_bert(tmp_path, placement, head, hidden_dropout_prob=1.0)
    run_at(pool, 2, _drop_everything, placement, head, tmp_path, 2)


def test_evaluation_drops_nothing(directories: dict[str, Path]) -> None:
    """Catches dropout that does not ask whether the model is being trained."""
    for directory in directories.values():
        model = MegatronBertForPreTraining.from_pretrained(directory)
        first, second = (model(**make_inputs("ForPreTraining")).prediction_logits for _ in range(2))
        assert torch.equal(first, second)
