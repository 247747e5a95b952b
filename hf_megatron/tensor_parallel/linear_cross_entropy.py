"""Output head fused with cross entropy: neither the full logits nor their gradient are materialized.

Tokens are processed in chunks: compute the logits, the losses, the gradient of the logits and its two products, then
free them. Ranks exchange only a few numbers per token and the gradient of the hidden states.

Shapes: T tokens, C tokens of a chunk, H hidden, V vocabulary, V_p this rank's part of it.

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
from hf_megatron.tensor_parallel.collectives import start_all_reduce
from hf_megatron.tensor_parallel.cpu import TiedGradient
from hf_megatron.tensor_parallel.cross_entropy import Softmax, Vocabulary, counted_targets, mean_scale
from hf_megatron.tensor_parallel.group import TensorParallelGroup

# Number of logits per chunk. Smaller chunks save little memory but read and write the weight gradient more often.
_LOGITS_PER_CHUNK = {"cpu": 2**24, "cuda": 2**26}


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
    tied: TiedGradient | None = None,
) -> torch.Tensor:
    """Mean cross entropy of ``hidden_states @ weight.T + bias``, computed only for the tokens that count.

    Under autocast the products run in its dtype; the gradient of the weight is summed up in the weight's own, or in
    float32 if that is float16.

    ``hidden_states`` are [T, H], replicated, ``weight`` [V_p, H] and ``bias`` [V_p], split on dim 0 as ``torch.chunk``
    cuts ``vocab_size``, and ``target`` [T], replicated. Targets, the other arguments of the loss, its value and its
    errors are those of :func:`vocab_parallel_cross_entropy`; its gradient can be taken once. Furthermore:

    - ``chunk_size`` is C; by default as many tokens as have 2**24 logits on a rank, or 2**26 on a GPU.
    - ``reduce_gradient`` makes the gradient of the hidden states whole. Without, it is left a partial sum, for hidden
      states out of a gather whose backward pass is a reduce-scatter.
    - ``tied`` is what ``weight`` comes from, on a CPU, if the word embedding has the same weight.

    Collective, in the forward pass and for each chunk: all-gather over tp of 3 x C numbers (4 x C with label
    smoothing); all-reduce over tp of the hidden states' gradient, in their dtype or, if the products are in float16, in
    float32, if one is needed and ``reduce_gradient``.
    """
    is_counted = counted_targets(target, vocab_size, ignore_index)
    device = hidden_states.device.type
    is_cast = torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if is_cast else hidden_states.dtype
    scale = mean_scale(is_counted, num_items_in_batch, dtype)
    if target.is_cpu and not torch.compiler.is_compiling():  # elsewhere the host would wait to learn how many count
        counted = is_counted.nonzero()[:, 0]
        hidden_states, target, is_counted = (x.index_select(0, counted) for x in (hidden_states, target, is_counted))
    tensors = (hidden_states, weight, bias)
    # The same on all ranks, whose shards may differ in size.
    largest_shard = chunk_range(vocab_size, group.size, 0)[1]
    head = _Head(
        vocabulary=Vocabulary(group, vocab_size, label_smoothing),
        dtype=dtype,
        chunk_size=chunk_size or max(1, _LOGITS_PER_CHUNK.get(device, 2**26) // largest_shard),
        # Checked here: inside of an autograd function, gradient recording is always off.
        needs=tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors),
        reduce_gradient=reduce_gradient and group.size > 1,
        tied=tied,
    )
    with torch.autocast(device, enabled=False):
        loss: torch.Tensor = _LinearCrossEntropy.apply(head, *tensors, target, is_counted, scale)
    return loss


@dataclass(frozen=True)
class _Head:
    """The settings of a fused head and loss that are equal for all chunks."""

    vocabulary: Vocabulary
    dtype: torch.dtype
    chunk_size: int
    needs: tuple[bool, ...]
    reduce_gradient: bool
    tied: TiedGradient | None


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss, a replicated scalar. The forward pass computes the gradients; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        head: _Head,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        is_counted: torch.Tensor,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        share = torch.where(is_counted, scale, 0.0)  # [T], each token's part in the gradient
        starts = range(0, target.shape[0], head.chunk_size)
        gradients = _Gradients(head, hidden_states, weight, bias, is_one_chunk=len(starts) < 2)
        total = torch.zeros_like(scale)
        for start in starts:
            chunk = slice(start, start + head.chunk_size)
            losses = gradients.add(chunk, target[chunk], share[chunk])
            total += torch.where(is_counted[chunk], losses, 0.0).sum()
        ctx.save_for_backward(*gradients.finish())
        ctx.tied = head.tied
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_states, weight, bias)]
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        def scaled(saved: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
                return saved * gradient  # with retain_graph=True the saved gradient will be needed again, unchanged
            # On a CPU, reading the value is free and may save a pass over the weight gradient.
            return saved if gradient.is_cpu and gradient == 1 else saved.mul_(gradient)

        gradients = [
            None if saved is None else scaled(saved).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        if ctx.tied is not None:
            ctx.tied.claim(gradients[1])
        return None, *gradients, None, None, None


class _Gradients:
    """Accumulates the gradients of hidden states, weight and bias chunk by chunk."""

    def __init__(
        self,
        head: _Head,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        is_one_chunk: bool,
    ) -> None:
        self.head = head
        # Cast to the dtype of the products; usually no copy.
        self.hidden_states, self.weight = hidden_states.to(head.dtype), weight.to(head.dtype)
        self.bias = None if bias is None else bias.to(head.dtype)
        # In float16, small values would underflow before the loss scale applies.
        held = hidden_states.dtype if head.dtype != torch.float16 else torch.float32
        # Accumulating chunks in 16 bits would lose the contribution of later chunks.
        is_short = not is_one_chunk or head.dtype == torch.float16
        self.sum_dtype = torch.promote_types(weight.dtype, torch.float32) if is_short else weight.dtype
        needs_hidden, self.needs_weight, needs_bias = head.needs
        self.d_hidden = hidden_states.new_empty(hidden_states.shape, dtype=held) if needs_hidden else None
        self.d_weight: torch.Tensor | None = None
        self.d_bias = None if bias is None or not needs_bias else torch.zeros_like(bias, dtype=self.sum_dtype)
        self._unfinished: list[Callable[[], Any]] = []

    def add(self, chunk: slice, target: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Add a chunk of C tokens with their targets [C], replicated; returns their losses [C], replicated.

        ``share`` [C] is what each token's loss is multiplied by in what gradients are taken of.
        """
        hidden = self.hidden_states[chunk]
        logits = F.linear(hidden, self.weight, self.bias)  # [C, V_p], split on dim 1
        softmax, losses, surprise = Softmax.of(self.head.vocabulary, logits, target)
        if any(self.head.needs):
            scale = self._scale_of_products(hidden, surprise, share)
            d_logits = softmax.write_gradient(share if scale is None else share * scale, out=logits)
            self._add_products(chunk, hidden, d_logits, scale)
        return losses

    def _scale_of_products(
        self, hidden: torch.Tensor, surprise: torch.Tensor, share: torch.Tensor
    ) -> torch.Tensor | None:
        """A scalar power of two that scales the products into the range of float16; None for other dtypes.

        It scales the logits' gradient to at most 2**8, so that no sum over tokens can overflow.
        """
        if self.head.dtype != torch.float16:
            return None
        # The largest entry of a token's row is the target's: without smoothing, the others add up to the same value.
        largest = (self.head.vocabulary.label_smoothing - torch.expm1(-surprise.clamp(min=0))) * share
        over_tokens = largest.sum() * hidden.abs().amax().to(largest.dtype)
        size = torch.maximum(largest.amax() / 2**8, over_tokens / 2**15)
        return torch.exp2(-size.clamp(min=2.0**-100).log2().ceil())

    def _add_products(
        self, chunk: slice, hidden: torch.Tensor, d_logits: torch.Tensor, scale: torch.Tensor | None
    ) -> None:
        def unscaled(product: torch.Tensor) -> torch.Tensor:
            return product if scale is None else product.to(scale.dtype).div_(scale)

        if self.d_hidden is not None:
            self.d_hidden[chunk] = unscaled(d_logits @ self.weight)  # [C, H], a partial sum
            if self.head.reduce_gradient:
                self._unfinished.append(start_all_reduce(self.head.vocabulary.group, self.d_hidden[chunk]))
        if self.needs_weight:
            if self.d_weight is None:
                self.d_weight = unscaled((d_logits.t() @ hidden).to(self.sum_dtype))
            elif hidden.dtype == self.sum_dtype:
                self.d_weight.addmm_(d_logits.t(), hidden)
            else:
                self.d_weight += unscaled(d_logits.t() @ hidden)
        if self.d_bias is not None:
            self.d_bias += unscaled(d_logits.sum(0, dtype=self.sum_dtype))

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of hidden states, weight and bias; None if not needed."""
        for wait in self._unfinished:
            wait()
        if self.needs_weight and self.d_weight is None:  # no token counts
            self.d_weight = torch.zeros_like(self.weight, dtype=self.sum_dtype)
        return self.d_hidden, self.d_weight, self.d_bias
