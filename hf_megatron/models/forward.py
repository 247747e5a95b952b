"""Shared wrapper of the base models' forwards: argument checks, sequence parallelism and full-sequence outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F

from hf_megatron.models.forward_arguments import check_arguments, rename_cache
from hf_megatron.partition import HeadCut
from hf_megatron.tensor_parallel import (
    SequenceParallelRegion,
    gather_from_tensor_parallel_region,
    reduce_from_tensor_parallel_region,
)


def region_of_call(
    model: Any, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> SequenceParallelRegion | None:
    """The sequence-parallel region of this call, or None.

    A sequence [..., S], or [..., S, H] as embeddings, with fewer positions than ranks is not split; a decoding step has
    only one position.
    """
    if not model.sequence_parallel or (input_ids is None and inputs_embeds is None):
        return None
    length = inputs_embeds.shape[-2] if inputs_embeds is not None else input_ids.shape[-1]  # type: ignore[union-attr]
    return SequenceParallelRegion(model.tp_group, length) if length >= model.tp_group.size else None


def base_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of a tensor-parallel base model.

    Unused arguments raise an error; this covers models with heads too, which pass their arguments on to here. The
    key-value cache can be passed under both of its names.

    If attention probabilities are requested, those of all ranks' heads are gathered to [B, N, S_q, S_k] per layer,
    replicated. With sequence parallelism, hidden states of all positions are gathered to [B, S, H], replicated.

    A head that gathers the last hidden states itself passes the call's ``region``; they are then left split.

    Collective: all-gather over tp, forward, per layer, if attentions are asked for (all-reduce, if the degree does not
    divide the heads); with sequence parallelism another for the last hidden states, and per layer, if hidden states are
    asked for.
    """
    signature = inspect.signature(forward)
    named = frozenset(signature.parameters) - {"kwargs"} | {"past_key_values"}

    @wraps(forward)
    def forward_and_gather(self: Any, *args: Any, region: SequenceParallelRegion | None = None, **kwargs: Any) -> Any:
        kwargs = rename_cache(kwargs)
        check_arguments(self, named, kwargs)
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        is_for_head = region is not None
        if not is_for_head and self.sequence_parallel:
            given = signature.bind(self, *args, **kwargs).arguments
            region = region_of_call(self, given.get("input_ids"), given.get("inputs_embeds"))
        outputs = forward(self, *args, return_dict=True, region=region, **kwargs)
        if self.tp_group.size > 1 and outputs.attentions is not None:
            outputs.attentions = tuple(_of_all_heads(self, part) for part in outputs.attentions)
        if region is not None:
            last, is_split = outputs.last_hidden_state, self.splits_last_hidden_state
            if outputs.hidden_states is not None:
                outputs.hidden_states = tuple(
                    state if state is None or (state is last and not is_split) else region.gather(state)
                    for state in outputs.hidden_states
                )
            if is_split and not is_for_head:
                outputs.last_hidden_state = region.gather(last)
        return outputs if return_dict else outputs.to_tuple()

    return forward_and_gather


def _of_all_heads(model: Any, part: torch.Tensor) -> torch.Tensor:
    """Probabilities [B, N, S_q, S_k], replicated, from those of the heads whose first column is here."""
    group, num_heads = model.tp_group, model.config.num_attention_heads
    if num_heads % group.size == 0:
        return gather_from_tensor_parallel_region(group, part, dim=1, size=num_heads)
    here = HeadCut(num_heads, model.config.hidden_size // num_heads, group.size, group.rank).first_here
    return reduce_from_tensor_parallel_region(group, F.pad(part, (0, 0, 0, 0, here.start, num_heads - here.stop)))
