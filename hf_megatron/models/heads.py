"""The vocabulary-parallel language-modeling head and its loss.

Shapes: B batch, S sequence, H hidden, V vocabulary, V_p this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_megatron.partition import Spec, VocabSplit
from hf_megatron.tensor_parallel import (
    ParallelModule,
    SequenceParallelRegion,
    copy_to_tensor_parallel_region,
    gather_from_tensor_parallel_region,
    local,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from hf_megatron.tensor_parallel.cpu import TiedGradient, is_tuned


class VocabParallelHead(ParallelModule):
    """Projection onto the vocabulary. A tied head has no parameters; it uses the embedding's shard.

    A second parameter for the same weight would be gathered and saved twice. Under FSDP2 it would also be trained
    incorrectly, without an error, if the rows do not divide evenly (two FSDP parameters for one tensor).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, hidden_size: int, vocab_size: int, *, is_tied: bool, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = hidden_size, vocab_size
        self.register_parameter("weight", None if is_tied else nn.Parameter(torch.empty(vocab_size, hidden_size)))
        self.register_parameter("bias", None if is_tied or not bias else nn.Parameter(torch.zeros(vocab_size)))
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)

    def partition_specs(self) -> Mapping[str, Spec]:
        return {"weight": VocabSplit(), "bias": VocabSplit()}

    def forward(
        self,
        hidden_states: torch.Tensor,
        shared_weight: Callable[[], torch.Tensor],
        bias: torch.Tensor | None = None,
        region: SequenceParallelRegion | None = None,
        labels: torch.Tensor | None = None,
        tied: TiedGradient | None = None,
        **loss_arguments: Any,
    ) -> torch.Tensor:
        """Return this rank's logits or, with labels, the loss, in less memory and time than through the logits.

        Hidden states [..., H], replicated, or with a region [S_p, ..., H], split on the sequence, to logits [..., V_p],
        split on the last dim. With labels [...], replicated, to the loss of
        :func:`vocab_parallel_linear_cross_entropy`, whose arguments the others are.

        A tied head uses the word embedding's weight [V_p, H], split on dim 0, which ``shared_weight`` gives, and a bias
        parameter [V], split on dim 0, if there is one.

        Collective: all-reduce over tp, backward, of the hidden states' gradient; with labels, those of
        :func:`vocab_parallel_linear_cross_entropy`, all of them forward. With a region all-gather over tp, forward, and
        reduce-scatter over tp, backward, in the place of the all-reduce.
        """
        if self.weight is not None:
            weight, bias = local(self.weight), self.bias
        else:
            weight = shared_weight() if tied is None else tied.for_head
        bias = None if bias is None else local(bias)
        hidden_states = hidden_states.to(weight.device)  # a tied head runs on the device of the embedding
        if region is not None:
            hidden_states = region.enter(hidden_states).movedim(0, -2)
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
            tied=tied,
            **loss_arguments,
        )

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, is_tied={self.weight is None}"
        return ", ".join(part for part in (sizes, super().extra_repr()) if part)


LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "label_smoothing")  # of a language model's forward


class VocabParallelLossMixin:
    """Mixin for models with a :class:`VocabParallelHead`: in training, the head computes the loss without logits."""

    fuses_head_and_loss = True  # set to False to get logits in training too, gathered on every rank
    has_vocab_parallel_loss = True
    _tied_weights_keys = None  # a tied head has no parameter

    def _is_fused(self: Any, labels: torch.Tensor | None) -> bool:
        """Whether this call computes the loss without logits; False if ``model.loss_function`` is set."""
        has_own_loss = getattr(self, "_loss_function", None) is not None
        return labels is not None and self.training and self.fuses_head_and_loss and not has_own_loss

    def _embed_for_tied_head(
        self: Any, head: VocabParallelHead, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, TiedGradient | None]:
        """Look up embeddings so that their gradient is added to that of a tied head; see :class:`TiedGradient`.

        Returns ``input_ids`` and ``inputs_embeds`` [B, S, H], one of them None, and where the gradients are added up.
        """
        embedding = self.get_input_embeddings()
        weight = embedding.weight
        has_gradient = head.weight is None and weight.requires_grad and torch.is_grad_enabled()
        # With FSDP and accelerate's hooks, the full weight is available only while its module is called.
        is_elsewhere = isinstance(self, FSDPModule) or hasattr(embedding, "_hf_hook")
        if input_ids is None or not has_gradient or is_elsewhere or not is_tuned(weight):
            return input_ids, None, None
        tied = TiedGradient(local(weight))
        self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        return None, embedding(input_ids.view(-1, input_ids.shape[-1]), tied), tied

    def _loss_and_logits(
        self: Any,
        predict: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None,
        targets: Any,
        *,
        loss_arguments: dict[str, Any],
        region: SequenceParallelRegion | None = None,
        tied: TiedGradient | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The loss, a scalar, if there are labels; the logits [..., V], unless the loss is computed without them.

        Both are replicated. ``predict`` is the head, or a module around it; ``labels`` are as they were given, for a
        loss function of the user's, and ``targets`` what each position has to predict. For the others see
        :meth:`VocabParallelHead.forward`.
        """
        shared_weight, vocab_size = self.get_input_embeddings().shared_weight, self.config.vocab_size
        if self._is_fused(labels):
            options = {"region": region, "tied": tied, **loss_arguments}
            return predict(hidden_states, shared_weight, labels=targets, **options), None
        shard = predict(hidden_states, shared_weight, region=region)  # [..., V_p], split on the last dim
        logits = gather_from_tensor_parallel_region(self.tp_group, shard, dim=-1, size=vocab_size)
        if labels is None:
            return None, logits
        own_loss = getattr(self, "_loss_function", None)  # set by ``model.loss_function = ...``
        if own_loss is not None:
            return own_loss(logits, labels, vocab_size=vocab_size, **loss_arguments), logits
        loss = vocab_parallel_cross_entropy(self.tp_group, shard, targets, vocab_size=vocab_size, **loss_arguments)
        return loss, logits


def next_token_labels(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Shift token ids [B, S] to next-token labels; the last position has none."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
