"""One full tensor from the ranks' shards, as places in their files: nothing is read, and nothing will be twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hf_megatron.checkpoint import LazyTensor, Piece, itemsize
from hf_megatron.partition import Box


def joined(shards: Sequence[LazyTensor], dim: int, limit: int | None = None) -> LazyTensor:
    """The shards one after the other along ``dim``, of which the first ``limit`` entries are kept."""
    pieces: list[Piece] = []
    position = 0
    for shard in shards:
        size = shard.shape[dim] if limit is None else min(shard.shape[dim], limit - position)
        if size <= 0:
            break
        box = Box.whole(shard.shape).narrowed(dim, position, position + size)
        pieces += _moved(shard, 0, box.shape, box.offset)
        position += size
    full = Box.whole(shards[0].shape).narrowed(dim, 0, position).shape
    return LazyTensor(shards[0].name, shards[0].dtype, full, tuple(pieces))


def one_of_qkv(shards: Sequence[LazyTensor], which: int, head_dim: int, version: float) -> LazyTensor:
    """The queries (0), keys (1) or values (2) of all heads: [h, h] or [h] out of fused shards [3h/t, h] or [3h/t].

    ``version`` is ``checkpoint_version``, which tells the order of a shard's rows: until 1.0 all queries, all keys, all
    values; at 1.0 the three alternate row by row; since then they alternate head by head, ``head_dim`` rows each.
    """
    pieces = [
        piece for rank, shard in enumerate(shards) for piece in _qkv_pieces(shard, rank, which, head_dim, version)
    ]
    rows = sum(shard.shape[0] for shard in shards) // 3
    return LazyTensor(shards[0].name, shards[0].dtype, (rows, *shards[0].shape[1:]), tuple(pieces))


def fused_qkv(shards: Sequence[LazyTensor], head_dim: int, version: float) -> LazyTensor:
    """All queries, then all keys, then all values: [3h, h] or [3h], from shards as for :func:`one_of_qkv`."""
    parts = [one_of_qkv(shards, which, head_dim, version) for which in range(3)]
    pieces = []
    for which, part in enumerate(parts):
        start = which * part.shape[0]
        for piece in part.pieces:
            box = Box((start + piece.box.offset[0], *piece.box.offset[1:]), piece.box.shape)
            pieces.append(replace(piece, box=box))
    return LazyTensor(parts[0].name, parts[0].dtype, (3 * parts[0].shape[0], *parts[0].shape[1:]), tuple(pieces))


def _qkv_pieces(shard: LazyTensor, rank: int, which: int, head_dim: int, version: float) -> list[Piece]:
    rows = shard.shape[0] // 3  # of queries on this rank
    rest = shard.shape[1:]
    zeros = (0,) * len(rest)
    if version < 1.0:
        return _moved(shard, which * rows, (rows, *rest), (rank * rows, *zeros))
    if version < 2.0:
        return [_every_third_row(shard, which, (rank * rows, *zeros))]
    return [
        piece
        for head in range(rows // head_dim)
        for piece in _moved(
            shard, (3 * head + which) * head_dim, (head_dim, *rest), (rank * rows + head * head_dim, *zeros)
        )
    ]


def _moved(shard: LazyTensor, row: int, shape: tuple[int, ...], offset: tuple[int, ...]) -> list[Piece]:
    """Part of a shard, of ``shape`` from ``row`` on, as the part at ``offset`` of the full tensor."""
    box = Box((row, *[0] * (len(shape) - 1)), shape)
    parts = (piece.part(box, itemsize(shard.dtype)) for piece in shard.pieces)
    shift = [a - b for a, b in zip(offset, box.offset, strict=True)]
    return [
        replace(part, box=Box(tuple(a + b for a, b in zip(part.box.offset, shift, strict=True)), part.box.shape))
        for part in parts
        if part is not None
    ]


def _every_third_row(shard: LazyTensor, row: int, offset: tuple[int, ...]) -> Piece:
    """Every third row of a shard from ``row`` on, as the part at ``offset`` of the full tensor."""
    (piece,) = shard.pieces
    item = itemsize(shard.dtype)
    shape, strides = (shard.shape[0] // 3, *shard.shape[1:]), (3 * piece.steps[0], *piece.steps[1:])
    start = piece.data_start + row * piece.steps[0] * item
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return replace(
        piece, box=Box(offset, shape), data_start=start, data_stop=start + (1 + last) * item, strides=strides
    )
