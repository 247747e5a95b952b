"""Arguments of forwards: both names of the key-value cache are accepted, unused arguments are rejected.

Stock forwards silently accept any keyword argument, so a misspelled one has no effect. This happened with the cache
when transformers 5.24 renamed it. Here, an argument that nothing uses raises an error.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from hf_megatron.errors import UnexpectedArgumentError

# Name of the key-value cache in the installed transformers; 5.24 renamed past_key_values to cache.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# Arguments that a base model accepts beyond those in its signature: who passes them, and why.
_ALWAYS = {
    "output_attentions": "callers and Trainer; transformers' capture_outputs records them",
    "output_hidden_states": "callers and Trainer; transformers' capture_outputs records them",
    "return_dict": "callers, heads and peft; base_forward gives a tuple where it is False",
    "is_causal": "callers; the mask and the attention follow it",
    "debug_io": "callers; transformers' merge_with_config_defaults writes what the layers compute into files",
    "debug_io_dir": "callers, with debug_io",
    "prune_layers": "callers, with debug_io",
}
_PACKED = {
    "cu_seq_lens_q": "DataCollatorWithFlattening and TRL; where packed sequences begin",
    "cu_seq_lens_k": "DataCollatorWithFlattening and TRL; where packed sequences begin",
    "max_length_q": "DataCollatorWithFlattening and TRL; the longest packed sequence",
    "max_length_k": "DataCollatorWithFlattening and TRL; the longest packed sequence",
    "seq_idx": "DataCollatorWithFlattening and TRL; for layers that are no attention, which no model here has",
}
_CONTINUOUS_BATCHING = {
    **_PACKED,
    "read_index": "generate_batch; where to read the paged cache",
    "write_index": "generate_batch; where to write the paged cache",
    "block_table": "generate_batch; the blocks of the paged cache, for kernels that follow them",
    "cache": "generate_batch of transformers 5.23, whose attention kernels update the paged cache",
    "logits_indices": "generate_batch, which uses it itself once the model is done",
    "logits_processor_args": "generate_batch, which uses it itself once the model is done",
}


def rename_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the key-value cache in keyword arguments to its older name, which the forwards here use.

    UnexpectedArgumentError if both names are given. Where transformers has renamed it, the older name gives the
    FutureWarning that stock forwards give. Under transformers 5.23 ``cache`` may also be the paged cache of
    continuous batching, an argument of the attention kernel; that is left alone.
    """
    renamed = dict(arguments)
    is_deprecated = CACHE == "cache" and renamed.get("past_key_values") is not None
    if is_deprecated and not torch.compiler.is_compiling():
        message = "`past_key_values` is deprecated, as in transformers' own forwards. Use `cache` instead."
        warnings.warn(message, FutureWarning, stacklevel=3)
    if "cache" not in renamed or not (CACHE == "cache" or isinstance(renamed["cache"], (Cache, type(None)))):
        return renamed
    cache = renamed.pop("cache")
    if cache is not None:
        if renamed.get("past_key_values") is not None:
            raise UnexpectedArgumentError("cache and past_key_values are the same argument; give one.")
        renamed["past_key_values"] = cache
    return renamed


def refuse_arguments(reason: str, **arguments: Any) -> None:
    """Raise UnexpectedArgumentError, with the reason, if any of these arguments is not None."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise UnexpectedArgumentError(f"{', '.join(given)}: {reason}; leave it out.")


def check_arguments(model: Any, named: Collection[str], arguments: Mapping[str, Any]) -> None:
    """Raise UnexpectedArgumentError for keyword arguments that nothing uses.

    The base model's forward does not name them, its attention kernel has no use for them, and they are not listed
    above.
    """
    unknown = [name for name in arguments if name not in named and name not in _ALWAYS]
    if unknown:
        used = _used_by_attention(model, arguments)
        unknown = [name for name in unknown if name not in used]
    if unknown:
        hint = ""
        if any(name in _PACKED for name in unknown):
            hint = " Packed sequences need flash attention, or a causal model's position_ids without an attention_mask."
        raise UnexpectedArgumentError(
            f"{type(model).__name__} got {', '.join(unknown)}, which neither it nor its attention kernel "
            f"({model.config._attn_implementation}) uses. Check the spelling, or leave it out.{hint}"
        )


def _used_by_attention(model: Any, arguments: Mapping[str, Any]) -> Collection[str]:
    implementation = model.config._attn_implementation
    if "write_index" in arguments:
        return _CONTINUOUS_BATCHING
    if is_flash_attention_requested(requested_attention_implementation=implementation):
        return _PACKED
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, None)
    if kernel is not None and not kernel.__module__.startswith("transformers."):
        return inspect.signature(kernel).parameters  # a custom kernel: assume that it uses all its parameters
    if model.mask_follows_position_ids and _are_packed_by_position_ids(arguments):
        return _PACKED
    return [name for name in _PACKED if arguments.get(name) is None]


def _are_packed_by_position_ids(arguments: Mapping[str, Any]) -> bool:
    """Whether the mask alone keeps packed sequences apart, as :func:`hf_megatron.models.masks.causal_mask` makes it."""
    return (
        arguments.get("position_ids") is not None
        and arguments.get("attention_mask") is None
        and arguments.get("past_key_values") is None
        and arguments.get("is_causal") is not False
    )
