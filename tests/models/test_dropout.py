"""Dropout: the same masks at every degree, so that training with it can be compared and repeated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron import MegatronGPT2LMHeadModel
from tests.models.reference import (
    Pool,
    assert_agrees,
    assert_all_agree,
    assert_all_equal,
    assert_same_on_all_ranks,
    full_gradients,
    layout,
    make_batch,
    rank,
    run_at,
    save_stock,
)
from tests.tiers import quick

P_ATTENTION, P_HIDDEN = 0.3, 0.1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model with dropout everywhere."""
    path = tmp_path_factory.mktemp("dropout")
    return save_stock(path, attn_pdrop=P_ATTENTION, resid_pdrop=P_HIDDEN, embd_pdrop=P_HIDDEN)


@dataclass
class _Steps:
    """Two training steps: their losses, the sum of their gradients, and the random state they leave behind."""

    losses: torch.Tensor
    gradients: dict[str, torch.Tensor]
    random_state: torch.Tensor


def _train(directory: Path, tp_size: int, attention: str, checkpointing: dict[str, Any] | None = None) -> _Steps:
    torch.manual_seed(1 + rank())  # loading puts the ranks in step with rank 0
    model = MegatronGPT2LMHeadModel.from_pretrained(
        directory, dtype=torch.float64, attn_implementation=attention, distributed_config=layout(tp_size)
    ).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)

    def check_output(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        assert_same_on_all_ranks(f"output of {type(module).__name__}", output)

    for module in (model.transformer.drop, *model.transformer.h, model.transformer.ln_f):
        module.register_forward_hook(check_output)
    losses = []
    for padding in ("right", "none"):
        loss = model(**make_batch(padding)).loss
        loss.backward()
        losses.append(loss.detach())
    assert_same_on_all_ranks("random state", torch.get_rng_state())
    return _Steps(torch.stack(losses), full_gradients(model), torch.get_rng_state())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_does_not_depend_on_the_degree(pool: Pool, directory: Path, attention: str) -> None:
    """Catches masks that depend on which rank a head lies on, and replicated activations that drop differently."""
    (expected,) = run_at(pool, 1, _train, directory, 1, attention)
    for tp_size in (2, 4):
        for steps in run_at(pool, tp_size, _train, directory, tp_size, attention):
            assert_agrees("losses", steps.losses, expected.losses)
            assert_all_agree("gradient", steps.gradients, expected.gradients)
            assert torch.equal(steps.random_state, expected.random_state)


def test_attention_implementations_drop_alike(directory: Path) -> None:
    """Catches an implementation that draws from the shared stream, where every rank gets the same masks."""
    expected, actual = _train(directory, 1, "eager"), _train(directory, 1, "sdpa")
    assert_agrees("losses", actual.losses, expected.losses)
    assert_all_agree("gradient", actual.gradients, expected.gradients)


@pytest.mark.parametrize(
    ("tp_size", "attention"), quick(itertools.product((1, 2), ("eager", "sdpa")), [(1, "eager"), (2, "sdpa")])
)
def test_checkpointing_changes_nothing(pool: Pool, directory: Path, attention: str, tp_size: int) -> None:
    """Catches a recomputation that drops other elements than the forward pass did: silently wrong gradients."""
    expected = run_at(pool, tp_size, _train, directory, tp_size, attention)[0]
    for reentrant, recompute in itertools.product((False, True), ("full", "selective")):
        options = {"use_reentrant": reentrant, "recompute": recompute}
        for steps in run_at(pool, tp_size, _train, directory, tp_size, attention, options):
            assert torch.equal(steps.losses, expected.losses)
            assert_all_equal(steps.gradients, expected.gradients)
            assert torch.equal(steps.random_state, expected.random_state)


def _attention_probabilities(directory: Path, tp_size: int) -> torch.Tensor:
    """Those of all layers [L, B, N, S, S] in training, after dropout."""
    model = MegatronGPT2LMHeadModel.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", distributed_config=layout(tp_size)
    ).train()
    torch.manual_seed(2)
    inputs = make_batch("none")
    outputs = model.transformer(inputs["input_ids"], output_attentions=True)
    return torch.stack(outputs.attentions).detach()


def test_every_head_has_a_mask_of_its_own(pool: Pool, directory: Path) -> None:
    """Catches ranks whose heads are masked alike, which the paper's runs and plain sdpa under TP would do."""
    (expected,) = run_at(pool, 1, _attention_probabilities, directory, 1)
    for probabilities in run_at(pool, 2, _attention_probabilities, directory, 2):
        assert_agrees("probabilities", probabilities, expected)
    visible = torch.ones(9, 9).tril().bool()
    is_dropped = (expected == 0)[..., visible]  # [L, B, N, visible]
    assert is_dropped.double().mean().item() == pytest.approx(P_ATTENTION, abs=0.03)
    patterns = is_dropped.movedim(2, 1).flatten(2).flatten(0, 1).int().tolist()
    assert len({tuple(pattern) for pattern in patterns}) == 2 * 12
    assert len({tuple(pattern) for pattern in is_dropped.flatten(0, 2).int().tolist()}) == 2 * 3 * 12


def test_kept_elements_are_scaled(directory: Path) -> None:
    """Catches a mean that dropout shifts."""
    dropped = _attention_probabilities(directory, 1)[0]
    model = MegatronGPT2LMHeadModel.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", attn_pdrop=0.0
    ).train()
    torch.manual_seed(2)
    whole = model.transformer(make_batch("none")["input_ids"], output_attentions=True).attentions[0].detach()
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0.0, whole / (1 - P_ATTENTION)))


def _evaluate(directory: Path, tp_size: int) -> torch.Tensor:
    model = MegatronGPT2LMHeadModel.from_pretrained(directory, distributed_config=layout(tp_size))
    first, second = (model(**make_batch("left")).loss.detach() for _ in range(2))
    assert torch.equal(first, second)
    return torch.as_tensor(first)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_evaluation_drops_nothing(pool: Pool, directory: Path, tp_size: int) -> None:
    """Catches dropout that does not ask whether the model is being trained."""
    for loss in run_at(pool, tp_size, _evaluate, directory, tp_size):
        assert loss.isfinite()
