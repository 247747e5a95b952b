"""Read ``tp`` directories: transformers' distributed checkpoints, one safetensors file per rank.

Each file contains its rank's part of every tensor as one box; the metadata stores where the boxes start. The sizes of
the full tensors are not stored. They come from the architecture's table, which reveals missing and stale files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_megatron.architectures import Architecture, table_for
from hf_megatron.checkpoint.budgets import MAX_FILES, MAX_PIECES, MAX_TENSORS
from hf_megatron.checkpoint.json_text import parse_json
from hf_megatron.checkpoint.lazy import LazyTensor, Piece
from hf_megatron.checkpoint.safetensors_header import Header, read_header, require_headers_within_limit
from hf_megatron.checkpoint.spelling import listed, model_class_of, respelled
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, shown
from hf_megatron.partition import Box, tiling_error

SHARDING_INFO = "DCP_SHARDING_INFO"
_SHARD_NAME = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

Shape = tuple[int, ...]


def is_shard(path: Path) -> bool:
    """Whether this is the name of a rank's file in a distributed checkpoint."""
    return _SHARD_NAME.fullmatch(path.name) is not None


def open_shards(files: Sequence[Path], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """The full tensors behind all the files of a ``tp`` directory, saved on any mesh, of the model of its config.json.

    CheckpointFormatError if a file does not say where its tensors start, CheckpointIncompleteError with all tensors
    concerned if the pieces do not tile every tensor of the model exactly once.
    """
    stored: dict[str, list[tuple[str, Piece]]] = {}
    count = 0
    _require_within(MAX_FILES, len(files), files[-1], "files")
    require_headers_within_limit(files)
    for path in files:
        header = read_header(path)
        count += len(header.tensors)
        _require_within(MAX_PIECES, count, path, "pieces of tensors")
        for name, offset in _offsets(header).items():
            tensor = header.tensors[name]
            box = Box(offset, tensor.shape)
            piece = Piece(path, box, tensor.data_start, tensor.data_stop, identity=header.identity)
            stored.setdefault(name, []).append((tensor.dtype, piece))
        _require_within(MAX_TENSORS, len(stored), path, "tensors")
    table = table_for(config)
    shapes = _known_shapes(table, config)
    required = table.tensors(config, model_class_of(table, config))
    present = {respelled(name, required, table.base_prefix) for name in stored}
    problems = [f"{name} is missing" for name in required if name not in present]
    tensors = {}
    for name, pieces in stored.items():
        boxes = [piece.box for _, piece in pieces]
        known = respelled(name, shapes, table.base_prefix)
        # Of a name unknown to the table at least gaps and overlaps are noticed.
        shape = shapes[known] if known is not None else _extent(boxes)
        dtypes = sorted({dtype for dtype, _ in pieces})
        if error := tiling_error(shape, boxes):
            problems.append(f"{name} {error}")
        elif len(dtypes) > 1:
            problems.append(f"{name} is stored as {' and '.join(dtypes)}")
        # If a dimension is too small for all ranks, the last ranks store empty boxes.
        held = sorted((piece for _, piece in pieces if piece.box.numel), key=lambda piece: piece.box.offset)
        tensors[name] = LazyTensor(name, dtypes[0], shape, tuple(held))
    if problems:
        lines = listed(problems, separator="\n  ")
        raise CheckpointIncompleteError(
            f"The {len(files)} shards in {files[0].parent} are not one complete checkpoint of the model in its "
            "config.json; a shard was lost, or some are left over from another save. Save or copy it again into an "
            f"empty directory. Tensors concerned:\n  {lines}"
        )
    return tensors


def _require_within(limit: int, number: int, path: Path, what: str) -> None:
    if number > limit:
        raise CheckpointFormatError(
            f"{path} is refused: with it there are {number:,} {what}, and the limit is {limit:,}."
        )


def _offsets(header: Header) -> dict[str, Shape]:
    """Where each tensor of a file starts in the full tensor."""
    try:
        info = parse_json(header.metadata[SHARDING_INFO].encode())
        offsets = {name: tuple(info[name]["saved_offsets"]) for name in header.tensors}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointFormatError(
            f"{header.path} is named like a shard of a distributed checkpoint, but its {SHARDING_INFO} does not say "
            "where each of its tensors starts."
        ) from error
    for name, offset in offsets.items():
        shape = header.tensors[name].shape
        if len(offset) != len(shape) or not all(type(start) is int and start >= 0 for start in offset):
            raise CheckpointFormatError(
                f"{header.path}: {shown(name)} of shape {list(shape)} cannot start at {shown(offset)} of the full one."
            )
    return offsets


def _known_shapes(table: Architecture, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of all tensors of all classes: a directory may hold more than the class it names, such as a tied head."""
    untied = {**config, "tie_word_embeddings": False}
    shapes: dict[str, Shape] = {}
    # The directory's own class comes last: heads of one name differ in shape from class to class.
    for model_class in (*table.classes, model_class_of(table, config)):
        shapes |= {tensor.name: tensor.shape for tensor in table.tensors(untied, model_class).values()}
    return shapes


def _extent(boxes: Sequence[Box]) -> Shape:
    """The smallest shape that holds all boxes."""
    stops = ([start + size for start, size in zip(box.offset, box.shape, strict=True)] for box in boxes)
    return tuple(map(max, zip(*stops, strict=False)))
