"""The language-modeling head, cut along the vocabulary, and its loss.

Shapes: B batch, S sequence, H hidden, V vocabulary, V_p this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_megatron.partition import Spec, VocabSplit
from hf_megatron.tensor_parallel import (
    ParallelModule,
    ReusedMemory,
    SequenceParallelRegion,
    TensorParallelGroup,
    VocabParallelEmbedding,
    copy_to_tensor_parallel_region,
    gather_from_tensor_parallel_region,
    local,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)


class VocabParallelHead(ParallelModule):
    """Projection onto the vocabulary. A tied head has no parameters of its own: it is given the embedding's shard.

    A second parameter for the same weight would be gathered and saved twice, and trains silently wrong under FSDP2 when
    the rows do not divide (two FSDP parameters for one tensor).

    Args:
        hidden_size: H.
        vocab_size: V.
        is_tied: Whether the weight is the word embedding's.
        bias: Whether a head that is not tied has a bias.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, hidden_size: int, vocab_size: int, *, is_tied: bool, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = hidden_size, vocab_size
        self._gradient_memory = ReusedMemory()
        self.register_parameter("weight", None if is_tied else nn.Parameter(torch.empty(vocab_size, hidden_size)))
        self.register_parameter("bias", None if is_tied or not bias else nn.Parameter(torch.zeros(vocab_size)))
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)

    def partition_specs(self) -> Mapping[str, Spec]:
        return {"weight": VocabSplit(), "bias": VocabSplit()}

    def forward(
        self,
        hidden_states: torch.Tensor,
        embedding: Callable[[], torch.Tensor],
        bias: torch.Tensor | None = None,
        region: SequenceParallelRegion | None = None,
        labels: torch.Tensor | None = None,
        **loss_arguments: Any,
    ) -> torch.Tensor:
        """This rank's logits; or the loss of predicting the labels, in less memory and time than by way of the logits.

        Args:
            hidden_states: [..., H], replicated; with a region [..., S_p, H], split on the sequence.
            embedding: Gives the word embedding's parameter [V, H], split on dim 0; used if the head is tied.
            bias: A bias parameter [V], split on dim 0; used if the head is tied.
            region: Where the hidden states come from, if they are split on the sequence.
            labels: [...], replicated; positions with ``ignore_index`` are not computed.
            **loss_arguments: See :func:`vocab_parallel_linear_cross_entropy`.

        Returns:
            The logits [..., V_p], split on the last dim. With labels the loss, a scalar, replicated, in float32, or in
            float64 for float64 hidden states.

        Collective: all-reduce over tp, backward, of the hidden states' gradient; with labels, those of
        :func:`vocab_parallel_linear_cross_entropy`, all of them forward. With a region all-gather over tp, forward, and
        reduce-scatter over tp, backward, in the place of the all-reduce.
        """
        weight, bias = (embedding(), bias) if self.weight is None else (self.weight, self.bias)
        weight, bias = local(weight), None if bias is None else local(bias)
        hidden_states = hidden_states.to(weight.device)  # a tied head computes where the embedding lies
        if labels is None and not torch.compiler.is_compiling():
            self._gradient_memory.release()  # what computes logits computes the gradient elsewhere, if at all
        if region is not None:
            hidden_states = region.enter(hidden_states)
        if labels is None:
            if region is None:
                (hidden_states,) = copy_to_tensor_parallel_region(self.tp_group, hidden_states)
            return F.linear(hidden_states, weight, bias)
        return vocab_parallel_linear_cross_entropy(
            self.tp_group,
            hidden_states.reshape(-1, self.in_features),
            weight,
            bias,
            labels.reshape(-1).to(hidden_states.device),
            vocab_size=self.out_features,
            reduce_gradient=region is None,
            memory=self._gradient_memory,
            **loss_arguments,
        )

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., V_p] split on the last dim to [..., V] replicated.

        Collective: all-gather over tp, forward.
        """
        return gather_from_tensor_parallel_region(self.tp_group, logits, dim=-1, size=self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, is_tied={self.weight is None}"
        return ", ".join(part for part in (sizes, super().extra_repr()) if part)


@contextmanager
def tied_weight(
    model: nn.Module, embedding: VocabParallelEmbedding, head: VocabParallelHead, labels: torch.Tensor | None
) -> Iterator[Callable[[], torch.Tensor]]:
    """Around the forward pass of a model, to get the word embedding's weight for its head.

    Args:
        model: The model they belong to.
        embedding: The word embedding.
        head: The head, tied or not.
        labels: The labels, if there are any.

    Yields:
        What gives the weight, split on dim 0, a DTensor [V, H] or a plain tensor [V_p, H].
    """
    weight = embedding.weight
    # Elsewhere the second gradient costs next to nothing (a GPU), or the weight is whole in its module only (FSDP2).
    pays = weight.is_cpu and not torch.compiler.is_compiling() and not isinstance(model, FSDPModule)
    has_gradient = model.training and labels is not None and torch.is_grad_enabled() and weight.requires_grad
    if hasattr(embedding, "_hf_hook"):  # accelerate offloads the weight, and brings it while its module is called
        yield lambda: embedding()  # not the module itself, which the hook of the head would move
    elif pays and has_gradient and head.weight is None:
        with embedding.sharing_gradient() as for_head:
            yield lambda: for_head
    else:
        yield lambda: weight


def next_token_labels(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """[B, S] token ids to what each position has to predict; nothing follows the last one."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def masked_lm_loss(
    group: TensorParallelGroup,
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Loss of predicting the masked tokens.

    Args:
        group: The tensor-parallel group.
        logits: [..., V_p], split on the last dim.
        labels: [...], replicated, ``ignore_index`` where nothing was masked.
        vocab_size: V.
        num_items_in_batch: What to divide the sum by; the number of labelled positions if None.
        ignore_index: Label of positions that do not count.
        label_smoothing: Share of the target distribution that is spread over the vocabulary.

    Returns:
        A scalar, replicated; float32, or float64 for float64 logits.

    Collective: two all-reduces over tp, forward, see :func:`vocab_parallel_cross_entropy`.
    """
    return vocab_parallel_cross_entropy(
        group,
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1).to(logits.device),
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        num_items_in_batch=num_items_in_batch,
    )


def causal_lm_loss(
    group: TensorParallelGroup,
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Loss of predicting each next token, as transformers defines it.

    Args:
        group: The tensor-parallel group.
        logits: [B, S, V_p], split on the last dim.
        labels: [B, S], replicated; shifted here.
        vocab_size: V.
        shift_labels: [B, S], labels that are shifted already and take the place of ``labels``.
        num_items_in_batch: What to divide the sum by; the number of predicted tokens if None.
        ignore_index: Label of positions that do not count.
        label_smoothing: Share of the target distribution that is spread over the vocabulary.

    Returns:
        A scalar, replicated; float32, or float64 for float64 logits.

    Collective: two all-reduces over tp, forward, see :func:`vocab_parallel_cross_entropy`.
    """
    if shift_labels is None:
        shift_labels = next_token_labels(labels, ignore_index)
    return masked_lm_loss(
        group,
        logits,
        shift_labels,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        num_items_in_batch=num_items_in_batch,
    )
