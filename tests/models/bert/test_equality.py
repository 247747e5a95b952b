"""The same numbers as the stock classes, for every head and both placements."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.bert.reference import (
    HEADS,
    MASKED_LM_HEADS,
    PLACEMENTS,
    VARIANTS,
    BertDir,
    assert_outputs_agree,
    gradients,
    loss_of,
    make_inputs,
    make_labels,
    our_class,
    stock_class,
)
from tests.models.reference import (
    Pool,
    assert_agrees,
    assert_all_agree,
    assert_same_on_all_ranks,
    layout,
    run_at,
)
from tests.tiers import quick

Kernel = tuple[torch.dtype, str]  # dtype and attention implementation

TWO_KERNELS: list[Kernel] = [(torch.float32, "sdpa"), (torch.float64, "eager")]
ONE_KERNEL: list[Kernel] = [(torch.float64, "sdpa")]
ALL_KERNELS: list[Kernel] = list(itertools.product((torch.float32, torch.float64), ("eager", "sdpa")))


def _load_pair(placement: str, head: str, directory: Path, tp_size: int, kernel: Kernel) -> tuple[Any, Any]:
    dtype, attention = kernel
    # Stock MegatronBert has eager attention only.
    stock = stock_class(placement, head).from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    ours = our_class(head).from_pretrained(
        directory, dtype=dtype, attn_implementation=attention, distributed_config=layout(tp_size)
    )
    return stock.train(), ours


def _compare(
    placement: str, head: str, directory: Path, tp_size: int, kernels: list[Kernel], paddings: tuple[str, ...]
) -> None:
    """A training step and an evaluation for every combination of kernel and padding."""
    for kernel, padding in itertools.product(kernels, paddings):
        stock, ours = _load_pair(placement, head, directory, tp_size, kernel)
        config = ours.config
        inputs = make_inputs(head, padding, config.pad_token_id, config.vocab_size)
        labels = make_labels(head, padding, config.vocab_size)
        valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool().flatten(0, -2)
        context = f"{kernel}, padding {padding}"
        # Kernels other than eager do not keep the probabilities.
        extras = {"output_hidden_states": True, "output_attentions": kernel[1] == "eager"}

        expected = stock(**inputs, **labels, **extras)
        loss = loss_of(expected, valid)
        loss.backward()
        outputs = ours.train()(**inputs, **labels)
        trained_loss = loss_of(outputs, valid)
        trained_loss.backward()
        if head in MASKED_LM_HEADS:
            logits = outputs.logits if head == "ForMaskedLM" else outputs.prediction_logits
            assert logits is None, "training computes logits nobody asked for"
        assert_agrees(f"{context}: loss", trained_loss, loss)
        assert_all_agree(f"{context}: gradient", gradients(ours), gradients(stock))

        with torch.no_grad():
            outputs = ours.eval()(**inputs, **labels, **extras)
        assert_agrees(f"{context}: loss in evaluation", loss_of(outputs, valid), loss)
        assert_outputs_agree(context, outputs, expected, valid)
        assert_same_on_all_ranks(f"{context}: first output", next(v for k, v in outputs.items() if k != "loss"))


_QUICK = [
    *((head, "pre" if i % 2 else "post", 2) for i, head in enumerate(HEADS)),
    ("ForPreTraining", "post", 1),
    ("ForPreTraining", "pre", 4),
]


@pytest.mark.parametrize(
    ("head", "placement", "tp_size"), quick(itertools.product(HEADS, PLACEMENTS, (1, 2, 4)), _QUICK)
)
def test_heads_equal_stock(pool: Pool, bert_dir: BertDir, placement: str, head: str, tp_size: int) -> None:
    """Catches a wrong cut, a missing or doubled reduction, a norm in the wrong place, a head that is not the stock one.

    Hidden states and attentions are compared as well: they must be those of all heads, and of the same places.
    """
    kernels = ONE_KERNEL if tp_size == 4 else TWO_KERNELS
    run_at(pool, tp_size, _compare, placement, head, bert_dir(placement, head), tp_size, kernels, ("right",))


@pytest.mark.parametrize("tp_size", [2, *(pytest.param(tp_size, marks=pytest.mark.slow) for tp_size in (1, 3, 4))])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "base"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_variants_equal_stock(pool: Pool, bert_dir: BertDir, placement: str, variant: str, tp_size: int) -> None:
    """Catches an entry of the configuration that is ignored, and cuts that only work for sizes that divide."""
    directory = bert_dir(placement, "ForPreTraining", variant)
    run_at(pool, tp_size, _compare, placement, "ForPreTraining", directory, tp_size, ONE_KERNEL, ("right",))


def _compare_inputs(placement: str, directory: Path, tp_size: int) -> None:
    stock, ours = _load_pair(placement, "ForMaskedLM", directory, tp_size, (torch.float64, "sdpa"))
    ids = make_inputs("ForMaskedLM", "none")["input_ids"]
    embeddings = torch.randn(3, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    causal_mask = torch.full((3, 1, 9, 9), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    everywhere, right = torch.ones(3, 9).bool(), make_inputs("ForMaskedLM")["attention_mask"].bool()
    for inputs, valid in (
        ({"input_ids": ids}, everywhere),
        ({"input_ids": ids, "token_type_ids": torch.ones_like(ids)}, everywhere),
        ({"input_ids": ids, "position_ids": (torch.arange(9) * 3).expand(3, 9)}, everywhere),
        ({"inputs_embeds": embeddings}, everywhere),
        ({"input_ids": ids, "attention_mask": causal_mask}, everywhere),
        ({"input_ids": ids, "attention_mask": right}, right),
    ):
        assert_outputs_agree(str(list(inputs)), ours(**inputs), stock(**inputs), valid)


@pytest.mark.parametrize("tp_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_inputs_equal_stock(pool: Pool, bert_dir: BertDir, placement: str, tp_size: int) -> None:
    """Catches arguments that are dropped on the way, and token types or positions that are made up wrongly."""
    run_at(pool, tp_size, _compare_inputs, placement, bert_dir(placement, "ForMaskedLM"), tp_size)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_arguments_have_their_stock_places(bert_dir: BertDir, placement: str, head: str) -> None:
    """Catches `model(ids, mask, types)`, which works with stock, refused or understood in another order."""
    stock, ours = _load_pair(placement, head, bert_dir(placement, head), 1, (torch.float64, "eager"))
    inputs = make_inputs(head)
    in_order = [inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
    assert torch.equal(ours(*in_order)[0], ours(**inputs)[0])
    assert_outputs_agree(head, ours(*in_order), stock(*in_order), inputs["attention_mask"].bool().flatten(0, -2))


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_everything_equals_stock(pool: Pool, bert_dir: BertDir, placement: str, head: str, tp_size: int) -> None:
    """Catches what only one combination of head, dtype, kernel and padding gets wrong."""
    directory, paddings = bert_dir(placement, head), ("none", "left")
    run_at(pool, tp_size, _compare, placement, head, directory, tp_size, ALL_KERNELS, paddings, timeout=250)
