"""The pretraining heads: which positions are computed, and the order of sentences."""

import pytest
import torch

from hf_megatron.errors import UnsupportedError
from tests.live import on_live_ranks
from tests.models.architectures import BERTS, StockDir
from tests.models.reference import assert_agrees, gradients

PRE, POST = BERTS


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
@on_live_ranks()
def test_only_labelled_positions_are_computed(stock_dir: StockDir, head: str, tp_size: int) -> None:
    """Catches the vocabulary-wide product for the 85% of positions that no loss asks for."""
    model = PRE.load(stock_dir(PRE, head), tp_size, head)
    shapes: list[list[int]] = []
    model.cls.predictions.transform.register_forward_hook(lambda _, args, __: shapes.append(list(args[0].shape)))
    inputs, labels = PRE.inputs(head), {"labels": PRE.labels(head)["labels"]}
    others = {"labels": labels["labels"].masked_fill(labels["labels"] == -100, -1), "ignore_index": -1}
    for given in (labels, others, {}):
        outputs = model.train()(**inputs, **given)
        logits = outputs.logits if head == "ForMaskedLM" else outputs.prediction_logits
        assert (logits is None) == bool(given)
    assert model.eval()(**inputs, **labels)[1].shape == (3, 9, 131)
    labelled = int((labels["labels"] != -100).sum())
    assert 0 < labelled < 9
    assert shapes == [[labelled, 48], [labelled, 48], [3, 9, 48], [3, 9, 48]], shapes


@pytest.mark.parametrize("tp_size", [1, 2])
@on_live_ranks()
def test_a_batch_may_have_no_labels(stock_dir: StockDir, tp_size: int) -> None:
    """Catches a rank that gets nothing to predict and fails, or leaves parameters without a gradient."""
    model = POST.load(stock_dir(POST), tp_size).train()
    nothing = torch.full((3, 9), -100)
    inputs, order = POST.inputs(), torch.tensor([0, 1, 1])
    loss = model(**inputs, labels=nothing, num_items_in_batch=torch.tensor(8), sentence_order_label=order).loss
    loss.backward()
    assert_agrees("loss", loss, model(**inputs, sentence_order_label=order).loss)
    found = gradients(model)
    assert not found["cls.predictions.transform.dense"].any()
    assert found["bert.encoder.layer.0.output.dense"].any()
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_the_two_names_of_the_sentence_order(stock_dir: StockDir) -> None:
    """Catches either name ignored, two labels of which one wins, and a loss that needs both heads' labels."""
    model = POST.load(stock_dir(POST), dtype=torch.float64).train()
    inputs, order = POST.inputs(), torch.tensor([0, 1, 1])
    labels = {"labels": POST.labels()["labels"]}
    masked_alone = model(**inputs, **labels).loss
    order_alone = model(**inputs, sentence_order_label=order).loss
    expected = torch.nn.functional.cross_entropy(model(**inputs).seq_relationship_logits, order)
    torch.testing.assert_close(order_alone, expected)
    for name in ("sentence_order_label", "next_sentence_label"):
        torch.testing.assert_close(model(**inputs, **labels, **{name: order}).loss, masked_alone + order_alone)
    with pytest.raises(UnsupportedError, match=r"sentence_order_label and next_sentence_label are the same"):
        model(**inputs, sentence_order_label=order, next_sentence_label=order)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
@pytest.mark.parametrize("tp_size", [1, 2])
@on_live_ranks()
def test_positions_that_are_given_change_nothing(stock_dir: StockDir, head: str, tp_size: int) -> None:
    """Catches labels of other positions, fillers that count, and gradients of other hidden states."""
    model = PRE.load(stock_dir(PRE, head), tp_size, head, dtype=torch.float64).train()
    inputs, labels = PRE.inputs(head), PRE.labels(head)["labels"]
    labels[0, 5:8], labels[2] = labels[0, 1], -100  # rows with more labels than others, and with none
    most = int((labels != -100).sum(1).max())
    positions = (labels == -100).int().argsort(dim=1, stable=True)[:, :most]
    found = []
    for given in ({}, {"masked_positions": positions}):
        model.zero_grad()
        loss = model(**inputs, labels=labels, **given).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (loss, expected), (given_loss, given_gradients) = found
    assert_agrees("loss", given_loss, loss)
    for name, gradient in expected.items():
        assert_agrees(f"gradient of {name}", given_gradients[name], gradient)


def test_positions_without_their_label_are_refused(stock_dir: StockDir) -> None:
    """Catches a label that is silently left out of the loss, or counts twice."""
    model = PRE.load(stock_dir(PRE, "ForMaskedLM"), head="ForMaskedLM").train()
    inputs, labels = PRE.inputs("ForMaskedLM"), PRE.labels("ForMaskedLM")["labels"]
    positions = (labels == -100).int().argsort(dim=1, stable=True)[:, :3]
    twice = positions.clone()
    twice[0, 2] = twice[0, 0]
    for wrong, message in ((positions[:, :1], "are missing"), (twice, "given twice")):
        with pytest.raises(UnsupportedError, match=message):
            model(**inputs, labels=labels, masked_positions=wrong)
