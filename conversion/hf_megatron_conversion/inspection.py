"""Say what a checkpoint is, from its configuration and the headers of its files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import prod
from pathlib import Path

from hf_megatron.checkpoint.atomic_directory import leftovers
from hf_megatron_conversion.card import dtype_names
from hf_megatron_conversion.formats import Container, FormatName, read_model
from hf_megatron_conversion.formats.base import SourceOptions, warn_of_padding
from hf_megatron_conversion.source import source_directory
from hf_megatron_conversion.tensors import num_bytes

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        format: The directory's format.
        container: Of a Megatron-core checkpoint: ``torch_dist``, or ``torch`` for one file per rank; None for others.
        core_version: The versions of Megatron-core that write such files, as far as it can be told.
        architecture: ``gpt2`` or ``bert``.
        model_class: The stock library's name of the class.
        model_type: In config.json.
        layernorm_placement: ``pre`` if the norms stand before attention and MLP, ``post`` if after.
        tp_size: Number of pieces the word embedding is cut into.
        num_parameters: Elements of all tensors, a tied head counted once.
        num_tensors: Number of tensors, without those that the model does not need.
        dtype: As torch calls it; if there are several, separated by commas, the most frequent first.
        bytes: Bytes of all tensors.
        vocab_size: Rows of the word embedding.
        checkpoint_version: Of a Megatron-LM or Megatron-core checkpoint; None for the others.
        dropped: Stored tensors that the model does not need.
    """

    format: FormatName
    container: Container | None
    core_version: str | None
    architecture: str
    model_class: str
    model_type: str
    layernorm_placement: str
    tp_size: int
    num_parameters: int
    num_tensors: int
    dtype: str
    bytes: int
    vocab_size: int
    checkpoint_version: float | None
    dropped: tuple[str, ...]


def inspect(path: str | Path, *, revision: str | None = None) -> Inspection:
    """Open a checkpoint, a directory or a repository on the Hub (at a revision), and describe it; reads no weights.

    Raises:
        CheckpointError: It is no checkpoint, or incomplete.
        UnsupportedError: A model that is not offered here.
    """
    directory = source_directory(path, revision=revision)
    for place in leftovers(directory.resolve()):
        _logger.warning("%s is being written, or was left by a process that was killed.", place)
    model = read_model(directory, SourceOptions(is_only_described=True))
    warn_of_padding(model)
    tensors = model.tensors.values()
    return Inspection(
        format=model.format,
        container=model.container,
        core_version=model.core_version,
        architecture=model.table.name,
        model_class=model.model_class.stock,
        model_type=str(model.config["model_type"]),
        layernorm_placement=model.table.norms,
        tp_size=model.tp_size,
        num_parameters=sum(prod(tensor.shape) for tensor in tensors),
        num_tensors=len(tensors),
        dtype=dtype_names(model.tensors),
        bytes=sum(map(num_bytes, tensors)),
        vocab_size=model.table.sizes(model.config)["vocab_size"],
        checkpoint_version=model.checkpoint_version,
        dropped=tuple(model.dropped),
    )
