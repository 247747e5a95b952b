"""Attention masks of the models: the stock ones, made on an accelerator without waiting for it.

The stock functions read a mask back to see whether it masks anything, and position ids to see whether they start anew.
On a CPU that is free and finds faster kernels. On an accelerator the host would wait until all earlier work is done, in
each forward, so there a mask that is given is applied as it is.

Shapes: B batch, S sequence, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, packed_sequence_mask_function

from hf_megatron.models.forward_arguments import CACHE


def causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
) -> Any:
    """The mask of a causal model, in the form that its attention implementation takes; None if it needs none.

    Args:
        config: The model's configuration.
        inputs_embeds: [B, S, H], replicated, whose sizes and dtype alone matter.
        attention_mask: [B, keys], 1 where there is a token, or as a finished mask [B, N or 1, S, keys], or None.
        cache: The keys and values of earlier tokens.
        position_ids: [B or 1, S] if the caller gave them, else None. Without mask and cache, tokens attend only as far
            back as the position ids rise by one: documents that are packed in one row stay apart.
    """
    options: dict[str, Any] = {"position_ids": position_ids}
    if not _is_read_freely(config, inputs_embeds):
        is_whole = attention_mask is None and not getattr(cache, "is_compileable", False)
        options = {"allow_is_causal_skip": is_whole}
        if position_ids is not None and attention_mask is None and cache is None:
            starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
            documents = starts.cumsum(-1).expand(inputs_embeds.shape[0], -1)
            options["and_mask_function"] = packed_sequence_mask_function(documents)
    return create_causal_mask(
        config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **{CACHE: cache}, **options
    )


def bidirectional_mask(
    config: PreTrainedConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None
) -> Any:
    """The mask of an encoder, in the form that its attention implementation takes; None if it needs none.

    The arguments are those of :func:`causal_mask`.
    """
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=attention_mask is None or _is_read_freely(config, inputs_embeds),
    )


def _is_read_freely(config: PreTrainedConfig, inputs_embeds: torch.Tensor) -> bool:
    # Flash attention takes the lengths of sequences as numbers, which someone has to read.
    return inputs_embeds.is_cpu or "flash" in config._attn_implementation or torch.compiler.is_compiling()
