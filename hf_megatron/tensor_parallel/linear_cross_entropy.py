"""The head's matrix product and the cross entropy in one, so that neither logits nor their gradient exist whole.

For a chunk of tokens at a time the logits are computed, turned into the chunk's loss and its gradients, and dropped.
Everything but the two statistics of each token stays on its rank, and what is sent travels while the next product is
computed.

Shapes: T tokens, C tokens of a chunk, H hidden, V vocabulary, V_p this rank's part of it, P ranks.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3, on fusing the head with the loss; the chunks are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hf_megatron.partition import chunk_range
from hf_megatron.tensor_parallel.collectives import start_all_gather_single, start_all_reduce
from hf_megatron.tensor_parallel.cross_entropy import check_target
from hf_megatron.tensor_parallel.group import TensorParallelGroup
from hf_megatron.tensor_parallel.reused_memory import ReusedMemory

__all__ = ["vocab_parallel_linear_cross_entropy"]

# Logits that exist at a time. Smaller chunks read and write the weight's gradient more often than memory gains by it.
_LOGITS_PER_CHUNK = {"cpu": 2**24, "cuda": 2**26}
# Logits that a CPU takes the exponentials of at a time, so that they stay in its cache from one step to the next.
_LOGITS_PER_BLOCK = 2**18


def vocab_parallel_linear_cross_entropy(
    group: TensorParallelGroup,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | float | None = None,
    chunk_size: int | None = None,
    reduce_gradient: bool = True,
    memory: ReusedMemory | None = None,
) -> torch.Tensor:
    """Mean cross entropy of ``hidden_states @ weight.T + bias``, of which tokens that do not count are not computed.

    Under autocast the products run in its dtype; the gradient of the weight is summed up in the weight's own.

    Args:
        group: The tensor-parallel group.
        hidden_states: [T, H], replicated.
        weight: [V_p, H], split on dim 0 as ``torch.chunk`` cuts ``vocab_size``.
        bias: [V_p], split on dim 0, or None.
        target: [T], token ids in ``[0, vocab_size)`` or ``ignore_index``, replicated.
        vocab_size: V.
        ignore_index: Tokens with this target count neither in the loss nor in the mean.
        label_smoothing: Share of the target distribution that is spread evenly over the vocabulary.
        num_items_in_batch: If given, the sum of the losses is divided by it instead of by the number of tokens that
            count.
        chunk_size: C; by default as many tokens as have 2**24 logits on a rank, or 2**26 on a GPU.
        reduce_gradient: Whether to make the gradient of the hidden states whole. If not it is left a partial sum, for
            hidden states out of a gather whose backward pass is a reduce-scatter.
        memory: Where to put the weight's gradient on a CPU.

    Returns:
        The loss, a scalar, replicated; float32, or float64 for float64 hidden states. NaN if no token counts, as in
        torch. Its gradient can be taken once.

    Raises:
        PartitionError: A target outside of the vocabulary.

    Collective, in the forward pass and for each chunk: all-gather over tp of 3 x C numbers (4 x C with label
    smoothing); all-reduce over tp of the hidden states' gradient, if one is needed
    and ``reduce_gradient``.
    """
    check_target(target, vocab_size, ignore_index)
    is_counted = target != ignore_index
    divisor = is_counted.sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(divisor, torch.Tensor):
        divisor = divisor.to(hidden_states.device)
    if not torch.compiler.is_compiling():  # how many tokens count is not known to a compiler
        counted = is_counted.nonzero()[:, 0]
        hidden_states, target, is_counted = (x.index_select(0, counted) for x in (hidden_states, target, is_counted))
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = (hidden_states, weight, bias)
    settings = _Settings(
        group=group,
        dtype=dtype,
        vocab_size=vocab_size,
        label_smoothing=label_smoothing,
        chunk_size=chunk_size or max(1, _LOGITS_PER_CHUNK.get(device, 2**26) // weight.shape[0]),
        # Asked for here: inside of the function there is always a gradient wanted and never one recorded.
        needs=tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors),
        reduce_gradient=reduce_gradient and group.size > 1,
        memory=memory if weight.is_cpu and memory is not None and not torch.compiler.is_compiling() else None,
    )
    scale = torch.as_tensor(1.0, dtype=loss_dtype, device=hidden_states.device) / divisor
    with torch.autocast(device, enabled=False):
        loss: torch.Tensor = _LinearCrossEntropy.apply(settings, *tensors, target, is_counted, scale)
    return loss


@dataclass(frozen=True)
class _Settings:
    """What does not change from chunk to chunk."""

    group: TensorParallelGroup
    dtype: torch.dtype
    vocab_size: int
    label_smoothing: float
    chunk_size: int
    needs: tuple[bool, ...]
    reduce_gradient: bool
    memory: ReusedMemory | None


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss, a replicated scalar. The gradients are computed on the way, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        is_counted: torch.Tensor,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        # Of float16 the smallest numbers would be lost before the loss scale comes to their rescue.
        is_scaled = settings.dtype != torch.float16
        one = torch.ones_like(scale)
        share = torch.where(is_counted, scale if is_scaled else one, 0.0)  # [T], each token's part in the gradient
        starts = range(0, target.shape[0], settings.chunk_size)
        gradients = _Gradients(settings, hidden_states, weight, bias, is_one_chunk=len(starts) < 2)
        total = torch.zeros_like(scale)
        for start in starts:
            chunk = slice(start, start + settings.chunk_size)
            losses = gradients.add(chunk, target[chunk], share[chunk])
            total += torch.where(is_counted[chunk], losses, 0.0).sum()
        ctx.save_for_backward(one if is_scaled else scale, *gradients.finish())
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, *gradients = ctx.saved_tensors
        factor = gradient * scale
        # On a CPU, where looking costs nothing, a pass over the weight's gradient is saved.
        is_one = factor.is_cpu and not torch.compiler.is_compiling() and factor == 1
        scaled = gradients if is_one else [None if g is None else g.mul_(factor) for g in gradients]
        return None, *scaled, None, None, None


class _Gradients:
    """The gradients of hidden states, weight and bias, as they grow chunk by chunk."""

    def __init__(
        self,
        settings: _Settings,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        is_one_chunk: bool,
    ) -> None:
        self.settings = settings
        self.parameters = (weight, bias)
        # Copies in the dtype of the products, which for most are the tensors themselves.
        self.hidden_states, self.weight = hidden_states.to(settings.dtype), weight.to(settings.dtype)
        self.bias = None if bias is None else bias.to(settings.dtype)
        self.range = chunk_range(settings.vocab_size, settings.group.size, settings.group.rank)
        needs_hidden, self.needs_weight, needs_bias = settings.needs
        self.d_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        self.d_weight: torch.Tensor | None = None
        # Chunk after chunk added up in a short dtype would lose what the later ones bring.
        self.sum_dtype = weight.dtype if is_one_chunk else torch.promote_types(weight.dtype, torch.float32)
        self.d_bias = None if bias is None or not needs_bias else torch.zeros_like(bias, dtype=self.sum_dtype)
        self._unfinished: list[Callable[[], Any]] = []

    def add(self, chunk: slice, target: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Take in a chunk.

        Args:
            chunk: Where its C tokens are.
            target: [C], replicated.
            share: [C], what each token's loss is multiplied by in what gradients are taken of.

        Returns:
            The losses [C], replicated.
        """
        settings, (start, stop) = self.settings, self.range
        hidden = self.hidden_states[chunk]
        is_mine = (target >= start) & (target < stop)
        mine = torch.where(is_mine, target - start, 0)  # [C], rows of the weight
        logits = F.linear(hidden, self.weight, self.bias)  # [C, V_p], split on dim 1
        exponentials, statistics = _exponentials(logits, mine, is_mine, bool(settings.label_smoothing))
        wait = _start_all_gather(settings.group, statistics)
        # The gradient of the logits is, but for the targets, the exponentials times one factor for each token. The
        # factor waits for the other ranks; this product does not.
        d_hidden = exponentials @ self.weight if self.d_hidden is not None else None
        losses, log_normalizer = _losses(wait(), settings)
        factor = (statistics[0] - log_normalizer).exp() * share
        on_target = torch.where(is_mine, (settings.label_smoothing - 1) * share, 0.0)
        on_all = share * (-settings.label_smoothing / settings.vocab_size)
        if self.d_hidden is not None and d_hidden is not None:
            d_hidden = d_hidden * factor[:, None] + self.weight[mine] * on_target[:, None]
            if settings.label_smoothing:
                d_hidden += on_all[:, None] * self.weight.sum(0)
            self.d_hidden[chunk] = d_hidden
            if settings.reduce_gradient:
                self._unfinished.append(start_all_reduce(settings.group, self.d_hidden[chunk]))
        self._add_to_parameters(hidden, exponentials, mine, factor, on_target, on_all)
        return losses

    def _add_to_parameters(
        self,
        hidden: torch.Tensor,
        exponentials: torch.Tensor,
        mine: torch.Tensor,
        factor: torch.Tensor,
        on_target: torch.Tensor,
        on_all: torch.Tensor,
    ) -> None:
        smoothing, sum_dtype = self.settings.label_smoothing, self.sum_dtype
        if self.needs_weight:
            scaled = (hidden * factor[:, None]).to(hidden.dtype)
            if self.d_weight is None:
                self.d_weight = self._first_product(exponentials.t(), scaled)
            elif hidden.dtype == sum_dtype:
                self.d_weight.addmm_(exponentials.t(), scaled)
            else:
                self.d_weight += exponentials.t() @ scaled
            self.d_weight.index_add_(0, mine, (hidden * on_target[:, None]).to(sum_dtype))
            if smoothing:
                self.d_weight += on_all @ hidden.to(on_all.dtype)
        if self.d_bias is not None:
            self.d_bias += exponentials.t().to(factor.dtype) @ factor
            self.d_bias.index_add_(0, mine, on_target.to(sum_dtype))
            if smoothing:
                self.d_bias += on_all.sum()

    def _first_product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The first chunk's part of the weight's gradient [V_p, H], split on dim 0, in the dtype of the sum."""
        memory = self.settings.memory
        if memory is None:
            return (left @ right).to(self.sum_dtype)
        total = memory.empty(torch.Size((left.shape[0], right.shape[1])), self.sum_dtype)
        return torch.mm(left, right, out=total) if right.dtype == self.sum_dtype else total.copy_(left @ right)

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The gradients of hidden states, weight and bias, None where none is needed."""
        for wait in self._unfinished:
            wait()
        weight, bias = self.parameters
        if self.needs_weight and self.d_weight is None:  # no token counts
            self.d_weight = torch.zeros_like(weight)
        d_weight = None if self.d_weight is None else self.d_weight.to(weight.dtype)
        return self.d_hidden, d_weight, None if bias is None or self.d_bias is None else self.d_bias.to(bias.dtype)


def _exponentials(
    logits: torch.Tensor, mine: torch.Tensor, is_mine: torch.Tensor, with_sum: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exponentials of the logits less their maximum on this rank [C, V_p], and what the loss needs to know of them.

    The first takes the place of the logits. The second is [3 or 4, C]: maximum, sum of exponentials, logit of the
    target if it is here, and sum of the logits.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    predicted = torch.where(is_mine, logits.gather(1, mine[:, None])[:, 0].to(dtype), 0.0)
    in_blocks = logits.is_cpu and not torch.compiler.is_compiling()
    size = max(1, _LOGITS_PER_BLOCK // logits.shape[1]) if in_blocks else logits.shape[0]
    maxima, totals, sums = [], [], []
    for block in logits.split(size):
        values = block.to(dtype)
        if with_sum:
            sums.append(values.sum(1))
        maxima.append(values.amax(1))
        totals.append(values.sub_(maxima[-1][:, None]).exp_().sum(1))
        if block.dtype != dtype:  # otherwise the values are the block
            block.copy_(values)
    statistics = [torch.cat(maxima), torch.cat(totals), predicted]
    return logits, torch.stack([*statistics, torch.cat(sums)] if with_sum else statistics)


def _losses(statistics: torch.Tensor, settings: _Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and logarithms of the normalizer, both [C], from all ranks' statistics [P, 3 or 4, C]."""
    maxima, totals = statistics[:, 0], statistics[:, 1]
    maximum = maxima.amax(0)
    log_normalizer = maximum + (totals * (maxima - maximum).exp()).sum(0).log()
    losses = log_normalizer - statistics[:, 2].sum(0)
    if settings.label_smoothing:
        uniform = log_normalizer - statistics[:, 3].sum(0) / settings.vocab_size
        losses = (1 - settings.label_smoothing) * losses + settings.label_smoothing * uniform
    return losses, log_normalizer


def _start_all_gather(group: TensorParallelGroup, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to gather; the function that is returned waits and has the result [P, *tensor.shape]."""
    if group.size == 1:
        return lambda: tensor[None]
    gathered = tensor.new_empty((group.size * tensor.shape[0], *tensor.shape[1:]))
    wait = start_all_gather_single(group, gathered, tensor)

    def result() -> torch.Tensor:
        wait()
        return gathered.view(group.size, *tensor.shape)

    return result
