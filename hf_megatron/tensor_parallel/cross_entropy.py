"""Vocabulary-parallel cross entropy: the logits are never gathered.

Shapes: T tokens, V vocabulary, V_p this rank's part of it, P ranks.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3: a few numbers per token are sent instead of V logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_megatron.errors import PartitionError
from hf_megatron.partition import chunk_range
from hf_megatron.tensor_parallel.collectives import all_gather_stacked
from hf_megatron.tensor_parallel.cpu import row_blocks
from hf_megatron.tensor_parallel.embedding import are_in_range
from hf_megatron.tensor_parallel.group import TensorParallelGroup


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
        logits: [..., V_p], split on the last dim as ``torch.chunk`` cuts ``vocab_size``. Never modified.
        target: [...], token ids in ``[0, vocab_size)`` or ``ignore_index``, replicated.
        vocab_size: V, the real vocabulary; label smoothing spreads its mass over it.
        ignore_index: Positions with this target count neither in the loss nor in the mean.
        label_smoothing: Share of the target distribution that is spread evenly over the vocabulary.
        num_items_in_batch: If given, the sum of the losses is divided by it instead of by the number of positions
            that count (gradient accumulation: the number over all micro-batches).

    Returns:
        The loss, a scalar, replicated; float32, or float64 for float64 logits. NaN if no position counts, as in torch.

    Raises:
        PartitionError: A target outside of the vocabulary.

    Collective: all-gather over tp, forward, of 3 x T numbers (4 x T with label smoothing).
    """
    logits, target = logits.reshape(-1, logits.shape[-1]), target.reshape(-1).to(logits.device)
    vocabulary = Vocabulary(group, vocab_size, label_smoothing)
    is_counted = counted_targets(target, vocab_size, ignore_index)
    scale = mean_scale(is_counted, num_items_in_batch, logits.dtype)
    loss: torch.Tensor = _CrossEntropy.apply(vocabulary, logits, target, is_counted, scale)
    return loss


def counted_targets(target: torch.Tensor, vocab_size: int, ignore_index: int) -> torch.Tensor:
    """Which targets are not ``ignore_index``; PartitionError if one of these is no token of the vocabulary."""
    # A target outside of every shard would silently yield a loss of log(sum).
    is_counted = target != ignore_index
    ids = torch.where(is_counted, target, 0)
    if not are_in_range(ids, vocab_size, "a target is neither a token of the vocabulary nor ignore_index"):
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise PartitionError(
            f"target {wrong} is neither a token id below vocab_size={vocab_size} nor ignore_index={ignore_index}; "
            "check that the tokenizer belongs to this model."
        )
    return is_counted


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which losses and probabilities are computed for logits of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mean_scale(
    is_counted: torch.Tensor, num_items_in_batch: torch.Tensor | float | None, dtype: torch.dtype
) -> torch.Tensor:
    """The factor of each token's loss in the mean, a scalar, for logits of this dtype."""
    divisor = is_counted.sum() if num_items_in_batch is None else num_items_in_batch
    if not isinstance(divisor, torch.Tensor):
        divisor = torch.full((), divisor, dtype=wide(dtype), device=is_counted.device)
    return divisor.to(is_counted.device, wide(dtype)).reciprocal()


@dataclass(frozen=True)
class Vocabulary:
    """How the classes are split over the ranks, and the targets."""

    group: TensorParallelGroup
    size: int  # V
    label_smoothing: float  # share of the target distribution that is spread evenly over the vocabulary


@dataclass(frozen=True)
class Softmax:
    """Softmax statistics of logits: computes the losses, then the gradient of the logits.

    Maximum and sum are stored separately: combined into a log-sum-exp, the logarithm of the sum would be lost to
    rounding for a confident model.
    """

    vocabulary: Vocabulary
    logits: torch.Tensor  # [T, V_p], split on dim 1
    is_mine: torch.Tensor  # [T], whether the target lies on this rank
    mine: torch.Tensor  # [T], the target's column of the logits if it does, else 0
    maximum: torch.Tensor  # [T], over the whole vocabulary, replicated
    total: torch.Tensor  # [T], the sum of exp(logit - maximum), replicated

    @classmethod
    def of(
        cls, vocabulary: Vocabulary, logits: torch.Tensor, target: torch.Tensor
    ) -> tuple[Softmax, torch.Tensor, torch.Tensor]:
        """The softmax; the losses [T]; and minus the logarithms of the targets' probabilities [T], both replicated.

        Without label smoothing, the last two are equal. The target is [T], replicated; of one outside of the vocabulary
        the loss has no meaning.

        Collective: all-gather over tp of 3 x T numbers (4 x T with label smoothing).
        """
        group, smoothing = vocabulary.group, vocabulary.label_smoothing
        start, stop = chunk_range(vocabulary.size, group.size, group.rank)
        is_mine = (target >= start) & (target < stop)
        mine = torch.where(is_mine, target - start, 0)
        of_this_rank = _statistics(logits, mine, is_mine, with_sum=bool(smoothing))
        statistics = all_gather_stacked(group, of_this_rank)  # [P, 3 or 4, T]
        maxima, totals, predicted = statistics[:, 0], statistics[:, 1], statistics[:, 2].sum(0)
        maximum = maxima.amax(0)
        total = (totals * (maxima - maximum).exp()).sum(0)
        log_total = total.log()
        surprise = (maximum - predicted) + log_total
        losses = surprise
        if smoothing:
            losses = surprise.lerp((maximum - statistics[:, 3].sum(0) / vocabulary.size) + log_total, smoothing)
        return cls(vocabulary, logits, is_mine, mine, maximum, total), losses, surprise

    def write_gradient(self, share: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The gradient of the logits: probability less target probability, times each token's share.

        Computed in float32 or better and rounded once: for a nearly certain target, the difference is tiny. ``share``
        is [T], what the losses are multiplied by; ``out``, which is returned, is [T, V_p] and may be the logits.
        """
        smoothing = self.vocabulary.label_smoothing
        factor = share / self.total
        on_target = torch.where(self.is_mine, (smoothing - 1) * share, 0.0)[:, None]
        on_all = (share * (-smoothing / self.vocabulary.size))[:, None]
        for rows in row_blocks(self.logits):
            values = (self.logits[rows].to(share.dtype) - self.maximum[rows, None]).exp_().mul_(factor[rows, None])
            values.scatter_add_(1, self.mine[rows, None], on_target[rows])
            if smoothing:
                values += on_all[rows]
            out[rows] = values
        return out


def _statistics(logits: torch.Tensor, mine: torch.Tensor, is_mine: torch.Tensor, *, with_sum: bool) -> torch.Tensor:
    """[3 or 4, T] of this rank: maximum, sum of exponentials, the target's logit if it is here, sum of the logits."""
    dtype = wide(logits.dtype)
    # torch.where instead of a product with is_mine: the placeholder for another rank's target may be -inf.
    predicted = torch.where(is_mine, logits.gather(1, mine[:, None])[:, 0].to(dtype), 0.0)
    maxima, totals, sums = [], [], []
    for rows in row_blocks(logits):
        values = logits[rows].to(dtype)
        maxima.append(values.amax(1))
        finite = maxima[-1].clamp(min=torch.finfo(dtype).min)  # all words of this rank may be ruled out, with -inf
        totals.append((values - finite[:, None]).exp_().sum(1))
        if with_sum:
            sums.append(values.sum(1))
    statistics = [torch.cat(maxima), torch.cat(totals), predicted]
    return torch.stack([*statistics, torch.cat(sums)] if with_sum else statistics)


class _CrossEntropy(torch.autograd.Function):
    """The loss of given logits, a replicated scalar; their gradient needs no communication."""

    @staticmethod
    def forward(
        ctx: Any,
        vocabulary: Vocabulary,
        logits: torch.Tensor,
        target: torch.Tensor,
        is_counted: torch.Tensor,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        softmax, losses, _ = Softmax.of(vocabulary, logits, target)
        ctx.save_for_backward(is_counted, scale, logits, softmax.is_mine, softmax.mine, softmax.maximum, softmax.total)
        ctx.vocabulary = vocabulary
        return torch.where(is_counted, losses, 0.0).sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None, None]:
        is_counted, scale, logits, *of_softmax = ctx.saved_tensors
        # torch.where instead of a product with is_counted: if no position counts, the mean is 0/0 and not finite.
        share = torch.where(is_counted, gradient * scale, 0.0)
        softmax = Softmax(ctx.vocabulary, logits, *of_softmax)
        return None, softmax.write_gradient(share, torch.empty_like(logits)), None, None, None
