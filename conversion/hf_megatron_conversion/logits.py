"""Run two checkpoints side by side: the proof that does not depend on how tensors are compared.

Both are run as the stock library's class, in float32, unsharded, on the CPU. Whole models are held in memory, one at a
time, which is why this stands apart from conversion.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from hf_megatron_conversion.formats.base import Model

__all__ = ["logit_difference", "outputs"]

_SEED = 0
_MAX_TOKENS = 64
# Two runs of the same weights may add in another order; relative to the largest output.
_TOLERANCE = 1e-5


def logit_difference(a: Model, b: Model) -> tuple[float | None, str | None]:
    """The largest difference of the two models' outputs on the same token ids, and in words what is wrong, if anything.

    The difference is None if the two cannot be run on the same ids or their outputs have different shapes.
    """
    configs = [_stock_config(model) for model in (a, b)]
    vocab_size = min(config.vocab_size for config in configs)
    num_tokens = min(_MAX_TOKENS, *(config.max_position_embeddings for config in configs))
    ids = torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(_SEED))
    outputs_a = outputs(a, ids)
    outputs_b = outputs(b, ids)
    shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (outputs_a, outputs_b)]
    if shapes[0] != shapes[1]:
        return None, f"the outputs' shapes {shapes[0]} are not {shapes[1]}"
    difference = max((x - y).abs().max().item() for x, y in zip(outputs_a, outputs_b, strict=True))
    scale = max(tensor.abs().max().item() for tensor in outputs_a)
    if not difference <= _TOLERANCE * scale:
        return difference, f"the outputs, at most {scale:g}, differ by up to {difference:g}"
    return difference, None


def outputs(model: Model, ids: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of a checkpoint, run as the stock class in float32.

    Args:
        model: The checkpoint.
        ids: [B, S], token ids.

    Returns:
        The class's outputs in its own order, for a language model its logits [B, S, V].
    """
    model_class: Any = getattr(transformers, model.model_class.stock)
    config = _stock_config(model)
    state_dict = {name: tensor.read().float() for name, tensor in model.tensors.items()}
    module = model_class.from_pretrained(None, config=config, state_dict=state_dict, dtype=torch.float32).eval()
    if "MultipleChoice" in model.model_class.stock:
        ids = ids.unsqueeze(1)  # [B, number of choices, S]
    with torch.inference_mode():
        result = module(input_ids=ids)
    return [tensor for tensor in result.to_tuple() if isinstance(tensor, torch.Tensor)]


def _stock_config(model: Model) -> Any:
    """The stock library's configuration object for a checkpoint."""
    model_class: Any = getattr(transformers, model.model_class.stock)
    entries = model.table.config_of(model.config, model.model_class, stock=True)
    return model_class.config_class.from_dict({**entries, "use_cache": False})
