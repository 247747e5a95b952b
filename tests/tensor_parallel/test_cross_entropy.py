"""The loss of logits that are cut along the vocabulary against torch's on the whole logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hf_megatron.errors import PartitionError
from hf_megatron.partition import VocabSplit, chunk_range
from hf_megatron.tensor_parallel import (
    SINGLE,
    TensorParallelGroup,
    reduce_from_tensor_parallel_region,
    vocab_parallel_cross_entropy,
)
from tests.tensor_parallel.ranks import TP_SIZES, Pool, assert_close, group, proven, same_on_all_ranks

Loss = Callable[..., torch.Tensor]

V = 131  # over 2 ranks: 66 and 65; over 4: 33, 33, 33 and 32
# On every rank of 4, the first and the last token among them; ignored positions in between.
TARGET = torch.tensor([0, 130, -100, 33, 65, -100, 66, 32, 98, 99])
LAST_DIM = VocabSplit(1)

# What of float32 is left of a sum over the vocabulary in another order; bfloat16 gradients are rounded once from
# float32, so that they may differ by one unit in the last of their 8 bits.
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def _logits(num_tokens: int, vocab_size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits of a trained model's size: their exponentials differ by many orders of magnitude."""
    values = torch.randn(num_tokens, vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (values * 5).to(dtype)


def _run(loss_function: Loss, full_logits: torch.Tensor, target: torch.Tensor, options: dict[str, Any]) -> Any:
    tp = group()
    logits = LAST_DIM.shard(full_logits, tp.size, tp.rank).clone().requires_grad_()
    loss = loss_function(tp, logits, target, vocab_size=full_logits.shape[1], **options)
    (loss * 1.7).backward()
    return loss.detach(), logits.grad, logits.detach()


def _reference(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    num_items_in_batch: torch.Tensor | float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient by torch, as transformers computes the loss, but in float64 where the logits are."""
    logits = logits.clone().requires_grad_()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if num_items_in_batch is None:
        loss = F.cross_entropy(wide, target, **options)
    else:
        loss = F.cross_entropy(wide, target, reduction="sum", **options) / num_items_in_batch
    (loss * 1.7).backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def _check(
    pool: Pool, tp_size: int, logits: torch.Tensor, target: torch.Tensor, loss_function: Loss, **options: Any
) -> None:
    results = pool(tp_size).run(_run, loss_function, logits, target, options)
    expected_loss, expected_gradient = _reference(logits, target, **options)
    loss = same_on_all_ranks([loss for loss, _, _ in results])
    gradient = LAST_DIM.merge([gradient for _, gradient, _ in results])
    assert_close(loss, expected_loss, LOSS_TOLERANCE[logits.dtype])
    assert_close(gradient, expected_gradient, GRADIENT_TOLERANCE[logits.dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(23)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_loss_and_gradient_equal_torchs(
    pool: Pool, tp_size: int, label_smoothing: float, num_items: torch.Tensor | float | None, dtype: torch.dtype
) -> None:
    """Catches a wrong maximum, sum, shard, mean, smoothing or dtype, and a gradient that ignores what follows."""
    options = {"label_smoothing": label_smoothing, "num_items_in_batch": num_items}
    _check(pool, tp_size, _logits(len(TARGET), V, dtype), TARGET, vocab_parallel_cross_entropy, **options)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_loss_over_gpt2s_vocabulary(pool: Pool, tp_size: int, label_smoothing: float) -> None:
    """Catches padded or missing rows on the last rank, whose share of 50257 is the smallest."""
    target = torch.tensor([0, 50256, 12565, 12564, -100, 37695, 25129])
    options = {"label_smoothing": label_smoothing}
    _check(pool, tp_size, _logits(len(target), 50257), target, vocab_parallel_cross_entropy, **options)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_another_ignore_index(pool: Pool, tp_size: int) -> None:
    """Catches a fixed -100, and a token of the vocabulary that is to be ignored and is not."""
    target = TARGET.clamp(min=0)
    _check(pool, tp_size, _logits(len(target), V), target, vocab_parallel_cross_entropy, ignore_index=0)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_extreme_logits(pool: Pool, tp_size: int) -> None:
    """Catches exponentials that overflow for want of the maximum over all ranks, and a product of zero and infinity
    where a token that is suppressed stands in for another rank's target."""
    logits = _logits(len(TARGET), V)
    logits[0, 0] = logits[1, 100] = logits[2, 5] = 1e5
    logits[3:, [0, 34, 66, 100]] = -torch.inf
    target = torch.where(TARGET == 0, 1, TARGET)
    target[6] = 67
    _check(pool, tp_size, logits, target, vocab_parallel_cross_entropy)


@pytest.mark.parametrize("num_items", [None, 4])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_nothing_counts(pool: Pool, tp_size: int, num_items: int | None) -> None:
    """Catches gradients of 0/0 where torch's are zero: one micro-batch of padding only would end a training run."""
    target = torch.full((3,), -100)
    logits = _logits(3, V)
    expected_loss, expected_gradient = _reference(logits, target, num_items_in_batch=num_items)
    assert not expected_gradient.any()
    for loss, gradient, _ in pool(tp_size).run(
        _run, vocab_parallel_cross_entropy, logits, target, {"num_items_in_batch": num_items}
    ):
        assert torch.equal(loss.isnan(), expected_loss.isnan())
        assert num_items is None or loss.item() == 0.0
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_gradient_is_the_derivative(label_smoothing: float) -> None:
    """Catches a mistake that our formula and the reference share, by finite differences."""

    def loss(logits: torch.Tensor) -> torch.Tensor:
        target = torch.tensor([6, -100, 0])
        return vocab_parallel_cross_entropy(SINGLE, logits, target, vocab_size=7, label_smoothing=label_smoothing)

    assert torch.autograd.gradcheck(loss, _logits(3, 7).requires_grad_())


def test_backward_can_be_repeated() -> None:
    """Catches a backward pass that overwrites what it saved, as ``retain_graph=True`` would show."""
    logits = _logits(3, 7).requires_grad_()
    loss = vocab_parallel_cross_entropy(SINGLE, logits, torch.tensor([6, -100, 0]), vocab_size=7, label_smoothing=0.1)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, logits)[0], first)


def _message_about(bad_target: int) -> str:
    tp = group()
    logits = LAST_DIM.shard(_logits(2, V), tp.size, tp.rank)
    with pytest.raises(PartitionError) as caught:
        vocab_parallel_cross_entropy(tp, logits, torch.tensor([3, bad_target]), vocab_size=V)
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


# ------------------------------------------------- defects of known implementations


def _spelled_out_loss(
    group: TensorParallelGroup,
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    subtracts_in_place: bool = False,
    smooths_over_shard: bool = False,
    counts_ignored: bool = False,
) -> torch.Tensor:
    """The loss with autograd left to torch: right, unless it is asked for a defect."""
    start, stop = chunk_range(vocab_size, group.size, group.rank)
    maximum = logits.detach().max(dim=1, keepdim=True).values
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group.process_group)
    if subtracts_in_place:
        with torch.no_grad():
            logits -= maximum
        shifted = logits
    else:
        shifted = logits - maximum
    is_mine = (target >= start) & (target < stop)
    mine = torch.where(is_mine, target - start, 0)[:, None]
    predicted = torch.where(is_mine, shifted.gather(1, mine)[:, 0], 0.0)
    log_normalizer = reduce_from_tensor_parallel_region(group, shifted.exp().sum(1)).log()
    losses = log_normalizer - reduce_from_tensor_parallel_region(group, predicted)
    if label_smoothing:
        mean = shifted.mean(1)
        if not smooths_over_shard:
            mean = reduce_from_tensor_parallel_region(group, shifted.sum(1)) / vocab_size
        losses = (1 - label_smoothing) * losses + label_smoothing * (log_normalizer - mean)
    is_counted = torch.ones_like(is_mine) if counts_ignored else target != -100
    return (losses * is_counted).sum() / is_counted.sum()


def _forms(**defect: Any) -> pytest.MarkDecorator:
    """Ours, the spelled-out one, and that one with the defect."""
    return pytest.mark.parametrize(
        ("loss_function", "is_defective"),
        [
            pytest.param(vocab_parallel_cross_entropy, False, id="ours"),
            pytest.param(_spelled_out_loss, False, id="spelled_out"),
            pytest.param(partial(_spelled_out_loss, **defect), True, id="defective"),
        ],
    )


@_forms(subtracts_in_place=True)
def test_loss_leaves_the_callers_logits_alone(pool: Pool, loss_function: Loss, is_defective: bool) -> None:
    """Catches a maximum that is subtracted in place: models return the logits next to the loss."""
    logits = _logits(len(TARGET), V)
    with proven(is_defective):
        results = pool(2).run(_run, loss_function, logits, TARGET, {"label_smoothing": 0.1})
        assert torch.equal(LAST_DIM.merge([after for _, _, after in results]), logits)


@_forms(smooths_over_shard=True)
def test_label_smoothing_is_spread_over_the_whole_vocabulary(
    pool: Pool, loss_function: Loss, is_defective: bool
) -> None:
    """Catches smoothing over this rank's tokens only, which makes the loss differ from rank to rank."""
    with proven(is_defective):
        _check(pool, 2, _logits(len(TARGET), V), TARGET, loss_function, label_smoothing=0.1)


@_forms(counts_ignored=True)
def test_ignored_targets_do_not_count(pool: Pool, loss_function: Loss, is_defective: bool) -> None:
    """Catches labels of -100, which lie in no shard, that count as a loss of log(sum)."""
    with proven(is_defective):
        _check(pool, 2, _logits(len(TARGET), V), TARGET, loss_function)
