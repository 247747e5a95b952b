"""The loss of logits that are cut along the vocabulary against torch's on the whole logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hf_megatron.errors import PartitionError
from hf_megatron.partition import VocabSplit
from hf_megatron.tensor_parallel import SINGLE, vocab_parallel_cross_entropy
from tests.tensor_parallel.ranks import TP_SIZES, Pool, assert_close, group, same_on_all_ranks, values

V = 131  # over 2 ranks: 66 and 65; over 4: 33, 33, 33 and 32
# On every rank of 4, the first and the last token among them; ignored positions in between.
TARGET = torch.tensor([0, 130, -100, 33, 65, -100, 66, 32, 98, 99])
LAST_DIM = VocabSplit(1)

# What of float32 is left of a sum over the vocabulary in another order; bfloat16 gradients are rounded once from
# float32, so that they may differ by one unit in the last of their 8 bits.
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def _logits(num_tokens: int = len(TARGET), vocab_size: int = V, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits of a trained model's size: their exponentials differ by many orders of magnitude."""
    return (values(0, num_tokens, vocab_size) * 5).to(dtype)


def _run(full_logits: torch.Tensor, target: torch.Tensor, options: dict[str, Any]) -> Any:
    tp = group()
    logits = LAST_DIM.shard(full_logits, tp.size, tp.rank).clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(tp, logits, target, vocab_size=full_logits.shape[1], **options)
    (loss * 1.7).backward()
    return loss.detach(), logits.grad, logits.detach()


def _reference(
    logits: torch.Tensor, target: torch.Tensor, *, num_items_in_batch: Any = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient by torch, as transformers computes the loss, but in float64 where the logits are."""
    logits = logits.clone().requires_grad_()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(wide, target, reduction=reduction, **options) / (num_items_in_batch or 1)
    (loss * 1.7).backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def _check(pool: Pool, tp_size: int, logits: torch.Tensor, target: torch.Tensor, **options: Any) -> None:
    losses, gradients, after = zip(*pool(tp_size).run(_run, logits, target, options), strict=True)
    expected_loss, expected_gradient = _reference(logits, target, **options)
    assert_close(same_on_all_ranks(losses), expected_loss, LOSS_TOLERANCE[logits.dtype])
    assert_close(LAST_DIM.merge(list(gradients)), expected_gradient, GRADIENT_TOLERANCE[logits.dtype])
    assert torch.equal(LAST_DIM.merge(list(after)), logits), "the logits, which models return, have changed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(23)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_loss_and_gradient_equal_torchs(
    pool: Pool, tp_size: int, label_smoothing: float, num_items: torch.Tensor | float | None, dtype: torch.dtype
) -> None:
    """Catches a wrong maximum, sum, mean or dtype, ignored tokens that count, and a maximum subtracted in place."""
    options = {"label_smoothing": label_smoothing, "num_items_in_batch": num_items}
    _check(pool, tp_size, _logits(dtype=dtype), TARGET, **options)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_other_vocabularies_and_targets(pool: Pool, tp_size: int) -> None:
    """Catches padded or missing rows of 50257, of which the last rank has the fewest, and a fixed -100."""
    target = torch.tensor([0, 50256, 12565, 12564, -100, 37695, 25129])
    _check(pool, tp_size, _logits(len(target), 50257), target, label_smoothing=0.1)
    _check(pool, tp_size, _logits(), TARGET.clamp(min=0), ignore_index=0)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_extreme_logits(pool: Pool, tp_size: int) -> None:
    """Catches exponentials that overflow for want of the maximum over all ranks, a product of zero and infinity where
    a token that is suppressed stands in for another rank's target, and nan where all tokens of a rank are."""
    logits = _logits()
    logits[0, 0] = logits[1, 100] = logits[2, 5] = 1e5
    logits[3:, [0, 34, 66, 100]] = -torch.inf
    logits[4, : V - 5] = -torch.inf  # on 4 ranks all but the last one's
    target = torch.where(TARGET == 0, 1, TARGET)
    target[4], target[6] = V - 1, 67
    _check(pool, tp_size, logits, target)


@pytest.mark.parametrize("num_items", [None, 4])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_nothing_counts(pool: Pool, tp_size: int, num_items: int | None) -> None:
    """Catches gradients of 0/0 where torch's are zero: one micro-batch of padding only would end a training run."""
    target = torch.full((3,), -100)
    for loss, gradient, _ in pool(tp_size).run(_run, _logits(3), target, {"num_items_in_batch": num_items}):
        assert loss.isnan() if num_items is None else loss == 0.0
        assert not gradient.any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_gradient_is_the_derivative(label_smoothing: float) -> None:
    """Catches a mistake that our formula and the reference share, and a backward pass that overwrites what it saved."""

    def loss(logits: torch.Tensor) -> torch.Tensor:
        target = torch.tensor([6, -100, 0])
        return vocab_parallel_cross_entropy(SINGLE, logits, target, vocab_size=7, label_smoothing=label_smoothing)

    logits = _logits(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    total = loss(logits)
    first = torch.autograd.grad(total, logits, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(total, logits)[0], first)


def _message_about(bad_target: int) -> str:
    with pytest.raises(PartitionError) as caught:
        _run(_logits(2), torch.tensor([3, bad_target]), {})
    return str(caught.value)


@pytest.mark.parametrize("bad_target", [V, -1, -99])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_a_target_outside_of_the_vocabulary_raises(pool: Pool, tp_size: int, bad_target: int) -> None:
    """Catches a target in no shard, which counts as a loss of log(sum): wrong, and no error."""
    message = (
        f"target {bad_target} is neither a token id below vocab_size=131 nor ignore_index=-100; check that the "
        "tokenizer belongs to this model."
    )
    assert pool(tp_size).run(_message_about, bad_target) == [message] * tp_size
