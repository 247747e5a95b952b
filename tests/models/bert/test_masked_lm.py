"""The pretraining heads: which positions are computed, and the order of sentences."""

from pathlib import Path

import pytest
import torch

from hf_megatron.errors import UnsupportedError
from tests.models.architectures import BERTS, StockDir
from tests.models.reference import Pool, assert_agrees, gradients, run_at

PRE, POST = BERTS


def _positions_computed(head: str, directory: Path, tp_size: int) -> dict[str, list[int]]:
    """Shape of what the transform before the decoder is given, in each situation."""
    model = PRE.load(directory, tp_size, head)
    shapes: list[list[int]] = []
    model.cls.predictions.transform.register_forward_hook(lambda _, args, __: shapes.append(list(args[0].shape)))
    inputs, labels = PRE.inputs(head), {"labels": PRE.labels(head)["labels"]}
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
def test_only_labelled_positions_are_computed(pool: Pool, stock_dir: StockDir, head: str, tp_size: int) -> None:
    """Catches the vocabulary-wide product for the 85% of positions that no loss asks for."""
    labelled = int((PRE.labels(head)["labels"] != -100).sum())
    assert 0 < labelled < 9
    expected = {
        "training": [labelled, 48],
        "another ignore_index": [labelled, 48],
        "without labels": [3, 9, 48],
        "evaluation": [3, 9, 48],
    }
    seen = run_at(pool, tp_size, _positions_computed, head, stock_dir(PRE, head), tp_size)
    assert seen == [expected] * tp_size


def _train_without_labels(directory: Path, tp_size: int) -> None:
    model = POST.load(directory, tp_size).train()
    nothing = torch.full((3, 9), -100)
    inputs, order = POST.inputs(), torch.tensor([0, 1, 1])
    loss = model(**inputs, labels=nothing, num_items_in_batch=torch.tensor(8), sentence_order_label=order).loss
    loss.backward()
    assert_agrees("loss", loss, model(**inputs, sentence_order_label=order).loss)
    found = gradients(model)
    assert not found["cls.predictions.transform.dense"].any()
    assert found["bert.encoder.layer.0.output.dense"].any()
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_batch_may_have_no_labels(pool: Pool, stock_dir: StockDir, tp_size: int) -> None:
    """Catches a rank that gets nothing to predict and fails, or leaves parameters without a gradient."""
    run_at(pool, tp_size, _train_without_labels, stock_dir(POST), tp_size)


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
