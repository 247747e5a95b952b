"""One full tensor from the ranks' shards, as places in their files: nothing is read, and nothing will be twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

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
        pieces.append(_moved(shard, 0, box.shape, 1, box.offset))
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
        return [_moved(shard, which * rows, (rows, *rest), 1, (rank * rows, *zeros))]
    if version < 2.0:
        return [_moved(shard, which, (rows, *rest), 3, (rank * rows, *zeros))]
    return [
        _moved(shard, (3 * head + which) * head_dim, (head_dim, *rest), 1, (rank * rows + head * head_dim, *zeros))
        for head in range(rows // head_dim)
    ]


def _moved(shard: LazyTensor, row: int, shape: tuple[int, ...], step: int, offset: tuple[int, ...]) -> Piece:
    """Part of a shard, every ``step``-th row from ``row`` on, as the part at ``offset`` of the full tensor."""
    (piece,) = shard.pieces
    item = itemsize(shard.dtype)
    strides = piece.strides or tuple(prod(shard.shape[dim + 1 :]) for dim in range(len(shard.shape)))
    start = piece.data_start + row * strides[0] * item
    strides = (step * strides[0], *strides[1:])
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return Piece(piece.path, Box(offset, shape), start, start + (1 + last) * item, strides)
