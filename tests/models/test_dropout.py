"""Dropout: the same masks at every degree, so that training with it can be compared and repeated."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tests.live import on_live_ranks
from tests.models.architectures import ARCHITECTURES, GPT2, LAYERS, POST, PRE, B, ModelCase, S, StockDir, positions
from tests.models.reference import (
    Pool,
    Tensors,
    assert_agrees,
    assert_all_agree,
    assert_all_equal,
    assert_same_on_all_ranks,
    gradients,
    outputs_of,
    rank,
    run_at,
)
from tests.tiers import cases

P_ATTENTION, P_HIDDEN = 0.3, 0.1
LAYOUTS = [(1, False), (2, False), (2, True), (4, False), (4, True)]  # tp_size, and whether sequences are split


class _Steps(NamedTuple):
    """Two training steps: their losses, the sum of their gradients, and the random state they leave behind."""

    losses: torch.Tensor
    gradients: Tensors
    random_state: torch.Tensor


def _train(
    case: ModelCase,
    directory: Path,
    attention: str,
    tp_size: int,
    splits: bool = False,
    checkpointing: dict[str, Any] | None = None,
) -> _Steps:
    torch.manual_seed(1 + rank())  # loading puts the ranks in step with rank 0
    options = {"dtype": torch.float64, "attn_implementation": attention, **case.dropout(P_ATTENTION, P_HIDDEN)}
    model = case.load(directory, tp_size, sequence_parallel=splits, **options).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)
    if not splits:
        _watch(model)
    losses = []
    for padding, length in (("right", S), ("none", S - 1)):
        loss = model(**case.batch(None, padding, length)).loss
        loss.backward()
        losses.append(loss.detach())
    assert_same_on_all_ranks("random state", torch.get_rng_state())
    return _Steps(torch.stack(losses), gradients(model), torch.get_rng_state())


def _watch(model: nn.Module) -> None:
    """Between the layers, all ranks must have the same."""
    (layers,) = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: assert_same_on_all_ranks("input of a layer", inputs[0]))
    layers[-1].register_forward_hook(lambda _, __, out: assert_same_on_all_ranks("output", tree_leaves(out)[0]))


@cases(
    "case, attention, tp_size, splits, variant",
    (
        (case, attention, *at, variant)
        for case in ARCHITECTURES
        for attention in ("eager", "sdpa")
        for at in LAYOUTS
        for variant in ("base", "shared_heads")
    ),
    [
        *((case, "sdpa", 1, False, "base") for case in ARCHITECTURES),
        *((GPT2, "sdpa", 2, splits, "base") for splits in (False, True)),
        (GPT2, "eager", 4, False, "base"),
        (PRE, "eager", 4, True, "base"),
        (POST, "sdpa", 4, False, "base"),
        (POST, "sdpa", 2, True, "base"),
        (GPT2, "sdpa", 2, False, "shared_heads"),
        (POST, "eager", 4, True, "shared_heads"),
    ],
)
def test_masks_are_those_of_one_process(
    pool: Pool, stock_dir: StockDir, case: ModelCase, attention: str, tp_size: int, splits: bool, variant: str
) -> None:
    """Catches masks that depend on the rank, the kernel or the split, and replicated activations that drop apart."""
    directory = stock_dir(case, None, variant)
    expected = _train(case, directory, "eager", 1)
    for steps in run_at(pool, tp_size, _train, case, directory, attention, tp_size, splits):
        assert_agrees("losses", steps.losses, expected.losses)
        assert_all_agree("gradient", steps.gradients, expected.gradients)
        assert torch.equal(steps.random_state, expected.random_state)


@cases(
    "case, attention, tp_size, splits, variant",
    (
        *(
            (case, attention, *at, "base")
            for case in ARCHITECTURES
            for attention in ("eager", "sdpa")
            for at in LAYOUTS[:3]
        ),
        *((case, "eager", 2, False, "shared_heads") for case in ARCHITECTURES),
    ),
    [
        (GPT2, "eager", 1, False, "base"),
        (GPT2, "sdpa", 2, True, "base"),
        (PRE, "eager", 2, False, "base"),
        (POST, "eager", 1, False, "base"),
        (POST, "sdpa", 2, True, "base"),
        (GPT2, "eager", 2, False, "shared_heads"),
    ],
)
def test_checkpointing_changes_nothing(
    pool: Pool, stock_dir: StockDir, case: ModelCase, attention: str, tp_size: int, splits: bool, variant: str
) -> None:
    """Catches a recomputation that drops other elements than the forward pass did: silently wrong gradients."""
    job = (case, stock_dir(case, None, variant), attention, tp_size, splits)
    expected = run_at(pool, tp_size, _train, *job)[0]
    for reentrant, recompute in itertools.product((False, True), ("full", "selective")):
        options = {"use_reentrant": reentrant, "recompute": recompute}
        for steps in run_at(pool, tp_size, _train, *job, options):
            assert_agrees("losses", steps.losses, expected.losses)
            # Equal but for the rounding of what belongs to keys, or of products of unaligned columns.
            if (splits and not case.is_causal) or variant == "shared_heads":
                assert_all_agree("gradient", steps.gradients, expected.gradients)
            else:
                assert_all_equal(steps.gradients, expected.gradients)
            assert torch.equal(steps.random_state, expected.random_state)


def _probabilities(case: ModelCase, directory: Path, tp_size: int, attention_dropout: float) -> torch.Tensor:
    """Those of attention in all layers [L, B, N, S, S] in training, after dropout."""
    options = {"dtype": torch.float64, "attn_implementation": "eager", **case.dropout(attention_dropout, P_HIDDEN)}
    model = case.load(directory, tp_size, "Model", **options).train()
    torch.manual_seed(2)
    return torch.stack(model(**case.inputs("Model", "none"), output_attentions=True).attentions).detach()


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_every_head_has_a_mask_of_its_own(pool: Pool, stock_dir: StockDir, case: ModelCase) -> None:
    """Catches heads masked alike, as in the paper's runs, another probability, and a mean that dropout shifts."""
    dropped = _probabilities(case, stock_dir(case), 1, P_ATTENTION)
    for probabilities in run_at(pool, 2, _probabilities, case, stock_dir(case), 2, P_ATTENTION):
        assert_agrees("probabilities", probabilities, dropped)
    visible = torch.ones(S, S).tril().bool() if case.is_causal else torch.ones(S, S).bool()
    is_dropped = (dropped == 0)[..., visible]  # [L, B, N, visible]
    assert is_dropped.double().mean().item() == pytest.approx(P_ATTENTION, abs=0.03)
    assert len({tuple(pattern) for pattern in is_dropped.flatten(0, 2).int().tolist()}) == LAYERS * B * 12
    whole = _probabilities(case, stock_dir(case), 1, 0.0)[0]
    torch.testing.assert_close(dropped[0], torch.where(dropped[0] == 0, 0.0, whole / (1 - P_ATTENTION)))


_DROPPING = ("Model", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification")
_HEADS = [(case, head) for case in ARCHITECTURES for head in case.heads if head in _DROPPING]


@cases("case, head", _HEADS, [x for x in _HEADS if x[1] == "Model" or x[0] is POST])
@on_live_ranks(2)
def test_dropout_stands_where_stock_has_it(stock_dir: StockDir, case: ModelCase, head: str) -> None:
    """Catches dropout that is missing, doubled, or misplaced: with a probability of one, what is left tells."""
    options = {"dtype": torch.float64, **case.dropout(0.0, 1.0)}
    if case is not PRE:  # whose stock classes have no other dropout before a head
        options["classifier_dropout"] = 1.0
    stock = case.load_stock(stock_dir(case, head), head, **options)
    ours = case.load(stock_dir(case, head), 2, head, attn_implementation="eager", **options).train()
    inputs = case.inputs(head)
    valid = positions(inputs)
    for p_embeddings in (0.0, 1.0):  # with 1.0 nothing is left to see further on
        for model in (stock, ours):
            model.base_model.get_submodule(case.embedding_dropout).p = p_embeddings
        expected, actual = (model(**inputs, output_hidden_states=True) for model in (stock, ours))
        torch.testing.assert_close(dict(outputs_of(actual, valid)), dict(outputs_of(expected, valid)))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("case", ARCHITECTURES)
@on_live_ranks()
def test_evaluation_drops_nothing(stock_dir: StockDir, case: ModelCase, tp_size: int) -> None:
    """Catches dropout that does not ask whether the model is being trained."""
    model = case.load(stock_dir(case), tp_size, **case.dropout(P_ATTENTION, P_HIDDEN))
    first, second = (model(**case.batch()).loss for _ in range(2))
    assert torch.equal(first, second)
