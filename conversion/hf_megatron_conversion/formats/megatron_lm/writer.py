"""Lay out a stock model as a Megatron-LM checkpoint, as Megatron-LM's own code of 2021 to 2023 would have saved it.

``checkpoint_version`` 3.0, the second generation of names, one pipeline stage, and under the name ``release``, so that
Megatron-LM starts from the weights without asking for an optimizer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from hf_megatron.errors import UnsupportedError
from hf_megatron_conversion.files import OutputFile, TextFile
from hf_megatron_conversion.formats.base import Target
from hf_megatron_conversion.formats.megatron_lm.export import arguments_of, require_expressible
from hf_megatron_conversion.formats.megatron_lm.layout import Layout
from hf_megatron_conversion.torch_zip import torch_file

_logger = logging.getLogger(__name__)


def megatron_lm_files(target: Target) -> Sequence[OutputFile]:
    """One file per rank, and the one that names the release.

    Raises:
        UnsupportedError: The model has something that Megatron-LM has not; everything is listed.
        PartitionError: The degree does not divide the heads, or the MLP's size.
    """
    if target.max_shard_size is not None:
        raise UnsupportedError("max_shard_size is for hub directories; a megatron-lm directory has one file per rank.")
    require_expressible(target.model, target.tensors)
    layout = Layout(target)
    arguments = arguments_of(target, layout)
    _logger.info(
        "What is written is for Megatron-LM's legacy models (--use-legacy-models; the last ones are in core 0.17), and "
        "not for Megatron-core's; --to megatron-core is."
    )
    files: list[OutputFile] = [TextFile("latest_checkpointed_iteration.txt", b"release")]
    for rank in range(target.tp_size):
        content = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0, "model": _model(layout, rank)}
        files.append(torch_file(f"release/mp_rank_{rank:02d}/model_optim_rng.pt", content))
    return files


def _model(layout: Layout, rank: int) -> dict[str, Any]:
    """What a rank's file has under ``model``: dictionaries as Megatron-LM nests them."""
    embedding: dict[str, Any] = {}
    encoder: dict[str, Any] = {}
    language_model: dict[str, Any] = {"embedding": embedding, "encoder": encoder}
    result: dict[str, Any] = {"language_model": language_model}
    for name, tensor in layout.tensors(rank):
        module, _, parameter = name.partition(".")
        if module.endswith("_embeddings"):
            embedding[module] = {parameter: tensor}
        elif module in ("layers", "final_layernorm"):
            encoder[name] = tensor
        elif module in ("pooler", "output_layer"):
            language_model.setdefault(module, {})[parameter] = tensor
        else:
            result.setdefault(module, {})[parameter] = tensor
    return result
