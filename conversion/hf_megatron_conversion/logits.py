"""Run two checkpoints side by side: the proof that does not depend on how tensors are compared.

Both are run unsharded on the CPU in float64, where the order of additions does not matter and an eps or an activation
does. A Megatron-LM checkpoint is run by Megatron-LM's own equations from its own files, everything else as the class
that ``config.json`` names: the stock library's, or this package's where the stock one cannot compute it. One whole
model is in memory at a time, which is why this stands apart from conversion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

import hf_megatron
from hf_megatron.errors import CheckpointFormatError, HfMegatronError
from hf_megatron_conversion.formats.base import Model
from hf_megatron_conversion.formats.megatron_lm import MegatronCheckpoint
from hf_megatron_conversion.megatron_forward import megatron_outputs
from hf_megatron_conversion.sample import sample_ids
from hf_megatron_conversion.tensors import Readable

_MAX_TOKENS = 64
# In float64, relative to the largest output. The forms of the tanh gelu differ by 1e-9 of their values.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Agreement:
    """How the outputs of two models compare."""

    max_logit_diff: float | None  # None if they cannot be compared
    # Of both on the same ids, for language models: predicting the next word, or for BERT every word.
    losses: tuple[float | None, float | None]
    argmax_agreement: float | None  # share of the positions at which both find the same word the most likely
    difference: str | None  # in words what is wrong


def agreement(
    a: Model,
    b: Model,
    *,
    tensors: Mapping[str, Readable] | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
) -> Agreement:
    """Run two models on the same token ids, of a tokenizer in ``tokenizer`` or in the directories of the two.

    ``tensors`` and ``dtype`` are for the first one, as for :func:`outputs`.
    """
    ids = _sample((a, b), tokenizer)
    outputs_a, outputs_b = outputs(a, ids, tensors=tensors, dtype=dtype), outputs(b, ids)
    shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (outputs_a, outputs_b)]
    losses = (_loss(a, outputs_a, ids), _loss(b, outputs_b, ids))
    if shapes[0] != shapes[1]:
        return Agreement(None, losses, None, f"the outputs' shapes {shapes[0]} are not {shapes[1]}")
    difference = _largest_difference(outputs_a, outputs_b)
    same = (outputs_a[0].argmax(dim=-1) == outputs_b[0].argmax(dim=-1)).double().mean().item()
    scale = max(1.0, *(tensor.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item() for tensor in outputs_a))
    words = f"the outputs, at most {scale:g}, differ by up to {difference:g}"
    return Agreement(difference, losses, same, None if difference <= _TOLERANCE * scale else words)


@torch.inference_mode()
def outputs(
    model: Model,
    ids: torch.Tensor,
    *,
    tensors: Mapping[str, Readable] | None = None,
    dtype: str | None = None,
    is_stock: bool = False,
) -> list[torch.Tensor]:
    """The outputs for ``ids`` [B, S] in float64, in the class's own order; for a language model the logits [B, S, V].

    ``tensors`` take the place of the checkpoint's own, where it is not Megatron-LM's; the weights of one that is are
    first rounded to ``dtype`` (safetensors' spelling). With ``is_stock`` the stock class is run in any case.
    """
    token_types = torch.zeros_like(ids)
    token_types[:, ids.shape[1] // 2 :] = 1
    if isinstance(model.opened, MegatronCheckpoint) and not is_stock:
        return megatron_outputs(model.opened, ids, token_types, dtype)
    if "MultipleChoice" in model.model_class.stock:
        ids, token_types = ids.unsqueeze(1), token_types.unsqueeze(1)  # [B, number of choices, S]
    has_types = model.table.sizes(model.config).get("num_token_types", 0) > 1
    try:
        module = _module(model, model.tensors if tensors is None else tensors, is_stock=is_stock)
        result = module(input_ids=ids, **({"token_type_ids": token_types} if has_types else {}))
    except HfMegatronError:
        raise
    except Exception as error:  # entries that conversion has no use for may keep a model from running
        raise CheckpointFormatError(
            f"{model.directory} cannot be run as a {model.model_class.stock}; is its config.json right? {error}"
        ) from error
    return [tensor for tensor in result.to_tuple() if isinstance(tensor, torch.Tensor)]


def stock_gap(model: Model, tokenizer: Path | None = None) -> float:
    """How far the stock class's outputs are from the model's own, of a model that the stock class cannot express."""
    ids = _sample((model,), tokenizer)
    return _largest_difference(outputs(model, ids), outputs(model, ids, is_stock=True))


def _sample(models: Sequence[Model], tokenizer: Path | None) -> torch.Tensor:
    """Token ids [1, S] that all of the models take."""
    sizes = [model.table.sizes(model.config) for model in models]
    length = min(_MAX_TOKENS, *(size["max_length"] for size in sizes))
    directories = [path for path in (tokenizer, *(model.directory for model in models)) if path is not None]
    return sample_ids(directories, min(size["vocab_size"] for size in sizes), length)


def _largest_difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """Of values of which one is finite at least: a model with NaN in its weights gives NaN on either side."""
    differences = ((x - y).abs()[x.isfinite() | y.isfinite()] for x, y in zip(a, b, strict=True))
    return max((math.inf if part.isnan().any() else part.max().item()) if len(part) else 0.0 for part in differences)


def _loss(model: Model, results: Sequence[torch.Tensor], ids: torch.Tensor) -> float | None:
    """Mean cross entropy of a language model's first output."""
    if not model.model_class.is_language_model:
        return None
    logits = results[0]
    if model.table.is_causal:
        logits, ids = logits[:, :-1], ids[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten()).item()


def _module(model: Model, tensors: Mapping[str, Readable], *, is_stock: bool) -> Any:
    is_stock = is_stock or model.table.stock_mismatch(model.config) is None
    name = model.model_class.stock if is_stock else model.model_class.ours
    model_class: Any = getattr(transformers if is_stock else hf_megatron, name)
    entries = model.table.config_of(model.config, model.model_class, stock=is_stock)
    config = model_class.config_class.from_dict({**entries, "use_cache": False})
    state_dict = {name: tensor.read().double() for name, tensor in tensors.items()}
    has_bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        return model_class.from_pretrained(None, config=config, state_dict=state_dict, dtype=torch.float64).eval()
    finally:
        if has_bar:
            transformers.utils.logging.enable_progress_bar()
