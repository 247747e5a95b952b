"""Read a ``torch_dist`` checkpoint: its chunks as Megatron's tensors, whole and layer by layer.

Its shapes are global, so neither the tensor-parallel degree nor the pipeline stages have to be undone. The layers are
stacked in one tensor [L, ...], or each has a key of its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_megatron.checkpoint import LazyTensor, Piece, itemsize, listed
from hf_megatron.checkpoint.budgets import MAX_PIECES, BudgetError, require_within
from hf_megatron.checkpoint.distributed import (
    METADATA,
    METADATA_GLOBALS,
    Index,
    StoredTensor,
    open_record,
    open_tensor,
    read_index,
)
from hf_megatron.checkpoint.torch_file import open_torch_file
from hf_megatron.checkpoint.unpickle import globals_in
from hf_megatron.errors import CheckpointFormatError
from hf_megatron.partition import Box
from hf_megatron_conversion.formats.base import Model
from hf_megatron_conversion.formats.megatron_core.containers import MARK, torch_dist_directory
from hf_megatron_conversion.formats.megatron_core.settings import arguments_beside, is_nemo
from hf_megatron_conversion.formats.megatron_lm.config import ExternalFacts
from hf_megatron_conversion.formats.megatron_lm.names import own_name
from hf_megatron_conversion.formats.megatron_lm.pickled import MEGATRON_GLOBALS, attributes, value_of
from hf_megatron_conversion.formats.megatron_lm.reader import Stored, stock_model
from hf_megatron_conversion.formats.megatron_lm.stages import Shards

_logger = logging.getLogger(__name__)

_PLANNER = "torch.distributed.checkpoint.planner"
_STRATEGY = "megatron.core.dist_checkpointing.strategies.torch"
_INDEX_GLOBALS = (
    METADATA_GLOBALS
    | globals_in(_PLANNER, "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    | globals_in(_STRATEGY, "MCoreMetadata", "MCoreSavePlan")
)
_COMMON, _COMMON_STATE = "common.pt", "common_state/shard_0_1"
_STACKED = re.compile(r"(.*\blayers)\.(?!\d+\.)(.+)", re.DOTALL)  # else a line's end in a name costs much time
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")


def open_torch_dist(directory: Path, given: ExternalFacts) -> Model:
    """Open a distributed checkpoint as a stock model; of its tensors nothing but headers is read.

    Raises:
        CheckpointError: It is incomplete, damaged, unsafe, in another container, or of a model that the stock classes
            do not have.
    """
    place = torch_dist_directory(directory)
    index = read_index(place, _INDEX_GLOBALS)
    common = _common(place, index)
    problems: list[str] = []
    shards = _shards(place, index, problems)
    version = common.get("checkpoint_version", 3.0)
    if version != 3.0:
        problems.append(f"checkpoint_version={value_of(version)} is not known in this container (only 3.0)")
    if optimizer := sum(map(_is_optimizer, index.tensors)):
        _logger.warning("%s holds an optimizer's state (%d tensors), which is left out.", place, optimizer)
    archives: dict[Path, list[tuple[int, int]]] = {}
    for record in index.records:
        archives.setdefault(record.path, []).append((record.start, record.length))
    common_file = place / _COMMON
    words = shards.get("word_embeddings.weight")
    stored = Stored(
        place=place,
        shards=shards,
        tp_size=1 if words is None else len({piece.box.offset[:1] for piece in words[0].pieces}),
        is_core=True,
        files=[*sorted(archives), place / METADATA, place / MARK, *([common_file] if common_file.is_file() else [])],
        archives=archives,
        arguments=attributes(common.get("args")) or arguments_beside(place),
        container="torch_dist",
        core_version=_core_version(place, index, common),
        problems=problems,
    )
    return stock_model(directory, stored, given)


def _common(place: Path, index: Index) -> Mapping[str, Any]:
    """What is not cut: the arguments and where training was. All other objects are judged on the way."""
    objects = {name: open_record(record, MEGATRON_GLOBALS) for name, record in index.objects.items()}
    path = place / _COMMON
    if is_nemo(place):
        return {}  # NeMo's is a checkpoint of Lightning's, and of no use here
    if path.exists():
        content = open_torch_file(path, MEGATRON_GLOBALS)
    else:
        content = objects.get(_COMMON_STATE, [{}])
        content = content[0] if isinstance(content, list) and len(content) == 1 else None
    if not isinstance(content, dict):
        raise CheckpointFormatError(f"{place} has a {type(content).__name__} where {_COMMON} has a dictionary.")
    return content


def _shards(place: Path, index: Index, problems: list[str]) -> Shards:
    """Megatron's tensors by our names, each whole; ``problems`` is extended by what has no name here."""
    shards: Shards = {}
    unknown = []
    number = sum(map(_num_pieces, index.tensors.values()))
    try:
        require_within(MAX_PIECES, number, "tensors and pieces of them, layer by layer")
    except BudgetError as error:
        raise CheckpointFormatError(f"{place / METADATA} is refused: {error}.") from None
    for name, stored in index.tensors.items():
        if _is_optimizer(name):
            for chunk in stored.chunks:
                open_record(chunk.record, MEGATRON_GLOBALS)  # whoever loads it would run its pickle
            continue
        for own, tensor in _by_layer(name, open_tensor(stored, MEGATRON_GLOBALS)):
            if own is None:
                unknown.append(name)
            elif own in shards:
                problems.append(f"{own} is stored under two names")
            else:
                shards[own] = [tensor]
    if unknown := list(dict.fromkeys(unknown)):
        problems.append(f"{len(unknown)} stored names are not known: {listed(unknown)}")
    return shards


def _by_layer(name: str, tensor: LazyTensor) -> list[tuple[str | None, LazyTensor]]:
    """A tensor under our name for it, or if it is stacked [L, ...] each of its layers."""
    stacked = _stacked(name, tensor.shape)
    if stacked is None:
        return [(own_name(name), tensor)]
    pieces: list[list[Piece]] = [[] for _ in range(tensor.shape[0])]
    for piece in tensor.pieces:
        first = piece.box.offset[0]
        for layer in range(first, first + piece.box.shape[0]):
            row = piece.part(piece.box.narrowed(0, layer, layer + 1), itemsize(tensor.dtype))
            assert row is not None
            box = Box(row.box.offset[1:], row.box.shape[1:])
            pieces[layer].append(replace(row, box=box, strides=row.steps[1:]))
    return [
        (
            own_name(f"{stacked[1]}.{layer}.{stacked[2]}"),
            LazyTensor(name, tensor.dtype, tensor.shape[1:], tuple(of_layer)),
        )
        for layer, of_layer in enumerate(pieces)
    ]


def _stacked(name: str, shape: tuple[int, ...]) -> re.Match[str] | None:
    """Of a tensor in which layers are stacked, the two parts of its name, between which a layer's number would be."""
    return _STACKED.fullmatch(name) if shape else None


def _num_pieces(stored: StoredTensor) -> int:
    """How many tensors and pieces of them are made of one that is stored."""
    if _is_optimizer(stored.name) or not _stacked(stored.name, stored.shape):
        return 1 + len(stored.chunks)
    return stored.shape[0] + sum(chunk.box.shape[0] for chunk in stored.chunks)


def _is_optimizer(name: str) -> bool:
    return _OPTIMIZER.match(name) is not None


def _core_version(place: Path, index: Index, common: Mapping[str, Any]) -> str | None:
    """The versions of Megatron-core that write such files; None if it was something else."""
    names = {name.attribute for name in index.names}
    if not (place / _COMMON).is_file():
        return "0.19 or later" if _COMMON_STATE in index.objects else None
    if "MCoreMetadata" in names:
        return "0.15"
    if "mcore_data" in index.fields:
        if "all_local_plans" not in index.fields:
            return "0.11 or earlier"
        return "0.13 or 0.14" if "content_metadata" in common else "0.12 to 0.14"
    return "0.15 to 0.18" if "all_local_plans" in index.fields else None
