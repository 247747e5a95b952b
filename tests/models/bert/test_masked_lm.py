"""The pretraining heads: their loss and its options, which positions are computed, and the order of sentences."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron import MegatronBertForMaskedLM, MegatronBertForPreTraining
from hf_megatron.errors import UnsupportedError
from tests.models.bert.reference import (
    PLACEMENTS,
    BertDir,
    gradients,
    make_inputs,
    make_labels,
    our_class,
    stock_class,
)
from tests.models.reference import Pool, assert_agrees, assert_all_agree, layout, reference_loss, run_at
from tests.tiers import quick

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "accumulated": {"num_items_in_batch": torch.tensor(40)},
    "smoothed and accumulated": {"label_smoothing": 0.3, "num_items_in_batch": 40},
}


def _compare_losses(placement: str, directory: Path, tp_size: int) -> None:
    stock = stock_class(placement, "ForMaskedLM").from_pretrained(directory, dtype=torch.float64)
    ours = MegatronBertForMaskedLM.from_pretrained(
        directory, dtype=torch.float64, distributed_config=layout(tp_size)
    ).train()
    inputs, labels = make_inputs("ForMaskedLM"), make_labels("ForMaskedLM")["labels"]
    logits = stock(**inputs).logits
    unused = next(token for token in range(131) if not (labels == token).any())
    for name, options in OPTIONS.items():
        stock.zero_grad()
        expected = reference_loss(logits, labels, shift_labels=labels, **options)
        expected.backward(retain_graph=True)
        for ignored in (-100, unused):
            ours.zero_grad()
            given = {"labels": labels.masked_fill(labels == -100, ignored), "ignore_index": ignored}
            loss = ours(**inputs, **given, **options).loss
            loss.backward()
            assert_agrees(f"{name}: loss", loss, expected)
            assert_all_agree(f"{name}: gradient", gradients(ours), gradients(stock))
        with torch.no_grad():
            assert_agrees(f"{name}: in evaluation", ours.eval()(**inputs, labels=labels, **options).loss, expected)
        ours.train()


@pytest.mark.parametrize(
    ("placement", "tp_size"), quick(itertools.product(PLACEMENTS, (1, 2, 4)), [("pre", 2), ("post", 1)])
)
def test_losses_equal_stock(pool: Pool, bert_dir: BertDir, placement: str, tp_size: int) -> None:
    """Catches an option that is dropped on the way, or a mean over all positions where few have labels."""
    run_at(pool, tp_size, _compare_losses, placement, bert_dir(placement, "ForMaskedLM"), tp_size)


def _positions_computed(head: str, directory: Path, tp_size: int) -> dict[str, list[int]]:
    """Shape of what the transform before the decoder is given, in each situation."""
    model = our_class(head).from_pretrained(directory, distributed_config=layout(tp_size))
    shapes: list[list[int]] = []
    model.cls.predictions.transform.register_forward_hook(lambda _, args, __: shapes.append(list(args[0].shape)))
    inputs, labels = make_inputs(head), {"labels": make_labels(head)["labels"]}
    others = {"labels": labels["labels"].masked_fill(labels["labels"] == -100, -1), "ignore_index": -1}
    seen = {}
    for situation, given in (("training", labels), ("another ignore_index", others), ("without labels", {})):
        outputs = model.train()(**inputs, **given)
        logits = outputs.logits if head == "ForMaskedLM" else outputs.prediction_logits
        assert (logits is None) == bool(given)
        seen[situation] = shapes.pop()
    assert model.eval()(**inputs, **labels)[1].shape == (3, 9, 131)
    seen["evaluation"] = shapes.pop()
    assert shapes == []
    return seen


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
def test_only_labelled_positions_are_computed(pool: Pool, bert_dir: BertDir, head: str, tp_size: int) -> None:
    """Catches the vocabulary-wide product for the 85% of positions that no loss asks for."""
    labelled = int((make_labels(head)["labels"] != -100).sum())
    assert 0 < labelled < 9
    expected = {
        "training": [labelled, 48],
        "another ignore_index": [labelled, 48],
        "without labels": [3, 9, 48],
        "evaluation": [3, 9, 48],
    }
    seen = run_at(pool, tp_size, _positions_computed, head, bert_dir("pre", head), tp_size)
    assert seen == [expected] * tp_size


def _train_without_labels(directory: Path, tp_size: int) -> None:
    model = MegatronBertForPreTraining.from_pretrained(directory, distributed_config=layout(tp_size)).train()
    nothing = torch.full((3, 9), -100)
    inputs, order = make_inputs("ForPreTraining"), torch.tensor([0, 1, 1])
    loss = model(**inputs, labels=nothing, num_items_in_batch=torch.tensor(8), sentence_order_label=order).loss
    loss.backward()
    assert_agrees("loss", loss, model(**inputs, sentence_order_label=order).loss)
    found = gradients(model)
    assert not found["cls.predictions.transform.dense"].any()
    assert found["bert.encoder.layer.0.output.dense"].any()
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_batch_may_have_no_labels(pool: Pool, bert_dir: BertDir, tp_size: int) -> None:
    """Catches a rank that gets nothing to predict and fails, or leaves parameters without a gradient."""
    run_at(pool, tp_size, _train_without_labels, bert_dir("post"), tp_size)


def test_the_two_names_of_the_sentence_order(bert_dir: BertDir) -> None:
    """Catches either name ignored, two labels of which one wins, and a loss that needs both heads' labels."""
    model = MegatronBertForPreTraining.from_pretrained(bert_dir("post"), dtype=torch.float64).train()
    inputs, order = make_inputs("ForPreTraining"), torch.tensor([0, 1, 1])
    labels = {"labels": make_labels("ForPreTraining")["labels"]}
    masked_alone = model(**inputs, **labels).loss
    order_alone = model(**inputs, sentence_order_label=order).loss
    expected = torch.nn.functional.cross_entropy(model(**inputs).seq_relationship_logits, order)
    torch.testing.assert_close(order_alone, expected)
    for name in ("sentence_order_label", "next_sentence_label"):
        torch.testing.assert_close(model(**inputs, **labels, **{name: order}).loss, masked_alone + order_alone)
    with pytest.raises(UnsupportedError, match=r"sentence_order_label and next_sentence_label are the same"):
        model(**inputs, sentence_order_label=order, next_sentence_label=order)


def test_outputs_as_a_tuple_are_those_of_stock(bert_dir: BertDir) -> None:
    """Catches another order, or a None in the place of what stock leaves out."""
    inputs, labels = make_inputs("ForPreTraining"), make_labels("ForPreTraining")
    stock = stock_class("post", "ForPreTraining").from_pretrained(bert_dir("post"), dtype=torch.float64)
    ours = MegatronBertForPreTraining.from_pretrained(bert_dir("post"), dtype=torch.float64)
    expected, actual = (model(**inputs, **labels, return_dict=False) for model in (stock, ours))
    assert len(actual) == len(expected) == 3
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def _loss_dtypes(directory: Path, tp_size: int) -> dict[torch.dtype, torch.dtype]:
    dtypes = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model = MegatronBertForPreTraining.from_pretrained(
            directory, dtype=dtype, distributed_config=layout(tp_size)
        ).train()
        dtypes[dtype] = model(**make_inputs("ForPreTraining"), **make_labels("ForPreTraining")).loss.dtype
    return dtypes


@pytest.mark.parametrize("tp_size", [1, 2])
def test_loss_is_float32_or_better(pool: Pool, bert_dir: BertDir, tp_size: int) -> None:
    """Catches a loss computed in bfloat16, and float64 that is cut down to float32 on the way."""
    expected = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert run_at(pool, tp_size, _loss_dtypes, bert_dir("post"), tp_size) == [expected] * tp_size
