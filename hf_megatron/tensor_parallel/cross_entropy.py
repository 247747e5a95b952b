"""Cross entropy of logits that are split along the vocabulary, without ever gathering them.

Shapes: T tokens, V vocabulary, V_p this rank's part of it.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3 ("we fuse the output of the parallel GEMM with the cross
entropy loss"), which sends T scalars over the wire instead of T x V.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hf_megatron.errors import PartitionError
from hf_megatron.partition import chunk_range
from hf_megatron.tensor_parallel.collectives import start_all_reduce
from hf_megatron.tensor_parallel.group import TensorParallelGroup

__all__ = ["check_target", "vocab_parallel_cross_entropy"]


def vocab_parallel_cross_entropy(
    group: TensorParallelGroup,
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Mean cross entropy, equal to ``torch.nn.functional.cross_entropy`` on the gathered logits.

    Args:
        group: The tensor-parallel group.
        logits: [T, V_p], split on dim 1 as ``torch.chunk`` cuts ``vocab_size``. Never modified.
        target: [T], token ids in ``[0, vocab_size)`` or ``ignore_index``, replicated.
        vocab_size: V, the real vocabulary; label smoothing spreads its mass over it.
        ignore_index: Positions with this target count neither in the loss nor in the mean.
        label_smoothing: Share of the target distribution that is spread evenly over the vocabulary.
        num_items_in_batch: If given, the sum of the losses is divided by it instead of by the number of positions
            that count (gradient accumulation: the number over all micro-batches).

    Returns:
        The loss, a scalar, replicated; float32, or float64 for float64 logits. NaN if no position counts, as in torch.

    Raises:
        PartitionError: A target outside of the vocabulary.

    Collective: all-reduce over tp, forward, of T maxima; then one of 2 x T sums (3 x T with label smoothing).
    """
    check_target(target, vocab_size, ignore_index)
    losses: torch.Tensor = _VocabParallelCrossEntropy.apply(
        group, logits, target, vocab_size, ignore_index, label_smoothing
    )
    if num_items_in_batch is None:
        return losses.sum() / (target != ignore_index).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch


def check_target(target: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise PartitionError if a target is neither a token of the vocabulary nor ``ignore_index``."""
    # A target outside of every shard would count as a loss of log(sum): wrong, and no error. Reading the answer back
    # would stall a GPU, and inside a compiled graph there is nobody to raise to, so there the device asserts.
    is_valid = ((target >= 0) & (target < vocab_size)) | (target == ignore_index)
    if target.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(is_valid.all(), "a target is neither a token of the vocabulary nor ignore_index")
    elif not bool(is_valid.all()):
        wrong = int(target[~is_valid][0])
        raise PartitionError(
            f"target {wrong} is neither a token id below vocab_size={vocab_size} nor ignore_index={ignore_index}; "
            "check that the tokenizer belongs to this model."
        )


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token losses [T], replicated; the gradient of the logits is computed locally, without communication."""

    @staticmethod
    def forward(
        ctx: Any,
        group: TensorParallelGroup,
        logits: torch.Tensor,
        target: torch.Tensor,
        vocab_size: int,
        ignore_index: int,
        label_smoothing: float,
    ) -> torch.Tensor:
        start, stop = chunk_range(vocab_size, group.size, group.rank)
        compute_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        maximum = logits.max(dim=1).values.to(compute_dtype)  # [T]
        if group.size > 1:
            start_all_reduce(group, maximum, dist.ReduceOp.MAX, is_async=False)()
        shifted = logits.to(compute_dtype) - maximum[:, None]  # [T, V_p], a fresh tensor

        is_mine = (target >= start) & (target < stop)
        mine = torch.where(is_mine, target - start, 0)[:, None]  # [T, 1]
        # Not a product with is_mine: the logit that stands in for another rank's target may be -inf.
        predicted = torch.where(is_mine, shifted.gather(1, mine)[:, 0], 0.0)
        sums = [predicted, shifted.sum(1)] if label_smoothing else [predicted]
        exponentials = shifted.exp_()
        totals = torch.stack([exponentials.sum(1), *sums])  # [2 or 3, T], partial sums
        if group.size > 1:
            start_all_reduce(group, totals, is_async=False)()

        log_normalizer = totals[0].log()
        losses = log_normalizer - totals[1]
        if label_smoothing:
            losses = (1 - label_smoothing) * losses + label_smoothing * (log_normalizer - totals[2] / vocab_size)
        is_counted = target != ignore_index

        ctx.save_for_backward(exponentials.div_(totals[0][:, None]), mine, is_mine, is_counted)
        ctx.label_smoothing, ctx.vocab_size, ctx.dtype = label_smoothing, vocab_size, logits.dtype
        return torch.where(is_counted, losses, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None, None, None]:
        softmax, mine, is_mine, is_counted = ctx.saved_tensors
        # Not a product with is_counted: where no position counts, the mean is 0/0 and its gradient not finite.
        scale = torch.where(is_counted, gradient, 0.0)[:, None]  # [T, 1]
        on_target = (ctx.label_smoothing - 1) * is_mine[:, None].to(softmax.dtype)
        grad = softmax.scatter_add(1, mine, on_target)
        if ctx.label_smoothing:
            grad -= ctx.label_smoothing / ctx.vocab_size
        return None, grad.mul_(scale).to(ctx.dtype), None, None, None, None
