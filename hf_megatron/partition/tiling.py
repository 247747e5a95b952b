"""Do these boxes cover a tensor exactly once?

A ``tp`` directory says for each stored piece where it starts and how large it is, but not how large the full tensor is
meant to be. A missing shard therefore looks like a smaller tensor, and a stale shard of another degree like one more
piece; both are found only by checking that the pieces tile the shape the configuration asks for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from typing import cast

from hf_megatron.partition.spec import Box, Shape

_MAX_CUT_DIMENSIONS = 4  # each doubles the work at most
_MAX_COMPARISONS = 100_000  # to find two pieces that a message names


def tiling_error(shape: Shape, boxes: Sequence[Box]) -> str | None:
    """Say how boxes, in any order, fail to tile a full shape, or None if they cover every element exactly once.

    What it says names the offending sizes and follows the tensor's name.
    """
    whole = Box.whole(shape)
    for box in boxes:
        if len(box.shape) != len(shape):
            return f"is stored with {len(box.shape)} dimensions where {len(shape)} are expected"
        sides = zip(box.offset, box.shape, shape, strict=True)
        if any(start < 0 or start + size > limit for start, size, limit in sides):
            return f"has a piece of shape {list(box.shape)} at {list(box.offset)}, outside of its shape {list(shape)}"
    filled = [box for box in boxes if box.numel]
    cut = [dim for dim, size in enumerate(shape) if any(box.shape[dim] != size for box in filled)]
    if len(cut) > _MAX_CUT_DIMENSIONS:
        return f"is cut along {len(cut)} dimensions, and pieces of {_MAX_CUT_DIMENSIONS} at most can be put together"
    if _cover_once(whole, filled, cut):
        return None
    for box, other in islice(_neighbours(filled, cut), _MAX_COMPARISONS):
        if box.intersection(other) is not None:
            return (
                f"is stored twice: pieces of shape {list(box.shape)} at {list(box.offset)} and "
                f"{list(other.shape)} at {list(other.offset)} overlap (shards of another degree left behind?)"
            )
    covered = sum(box.numel for box in filled)
    if covered < whole.numel:
        return f"of shape {list(shape)} is incomplete: {covered} of {whole.numel} elements are stored"
    return f"is stored twice: of its {len(filled)} pieces some overlap (shards of another degree left behind?)"


def _cover_once(whole: Box, boxes: Sequence[Box], cut: Sequence[int]) -> bool:
    """Whether boxes inside ``whole``, all as long as it except in the dimensions ``cut``, cover each element once.

    How often each element is covered must be the same as by ``whole`` alone. It is if the differences from one element
    to the next are, along one dimension after the other; and of those few are left, where boxes begin and end.
    """
    counts: dict[tuple[object, ...], int] = defaultdict(int)
    for box, count in (*((box, 1) for box in boxes), *([(whole, -1)] if whole.numel else [])):
        counts[tuple((box.offset[dim], box.offset[dim] + box.shape[dim]) for dim in cut)] += count
    for index in range(len(cut)):
        differences: dict[tuple[object, ...], int] = defaultdict(int)
        for place, count in counts.items():
            begin, end = cast(tuple[int, int], place[index])
            differences[*place[:index], begin, *place[index + 1 :]] += count
            differences[*place[:index], end, *place[index + 1 :]] -= count
        counts = {place: count for place, count in differences.items() if count}
    return not any(counts.values())


def _neighbours(boxes: Sequence[Box], cut: Sequence[int]) -> Iterator[tuple[Box, Box]]:
    """Pairs of boxes that may overlap: one begins, along the dimension that is cut most, before the other ends."""
    dim = max(cut, key=lambda dim: len({box.offset[dim] for box in boxes}), default=None)
    if dim is None:
        yield from combinations(boxes, 2)
        return
    ordered = sorted(boxes, key=lambda box: box.offset[dim])
    for i, box in enumerate(ordered):
        for other in islice(ordered, i + 1, None):
            if other.offset[dim] >= box.offset[dim] + box.shape[dim]:
                break
            yield box, other
