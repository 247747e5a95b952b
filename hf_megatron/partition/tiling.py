"""Do these boxes cover a tensor exactly once?

A ``tp`` directory says for each stored piece where it starts and how large it is, but not how large the full tensor is
meant to be. A missing shard therefore looks like a smaller tensor, and a stale shard of another degree like one more
piece; both are found only by checking that the pieces tile the shape the configuration asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from hf_megatron.partition.spec import Box, Shape


def tiling_error(shape: Shape, boxes: Sequence[Box]) -> str | None:
    """Say how ``boxes`` fail to tile ``shape``, or None if they cover every element exactly once.

    Args:
        shape: The full tensor's shape.
        boxes: The stored pieces, in any order.

    Returns:
        A phrase that names the offending sizes ("covers 66 of 131 rows ..."), fit to follow the tensor's name.
    """
    whole = Box.whole(shape)
    for box in boxes:
        if len(box.shape) != len(shape):
            return f"is stored with {len(box.shape)} dimensions where {len(shape)} are expected"
        sides = zip(box.offset, box.shape, shape, strict=True)
        if any(start < 0 or start + size > limit for start, size, limit in sides):
            return f"has a piece of shape {list(box.shape)} at {list(box.offset)}, outside of its shape {list(shape)}"
    # Along the dimension with the most starts, few pieces lie beside each other, so that few pairs have to be compared.
    dim = max(range(len(shape)), key=lambda dim: len({box.offset[dim] for box in boxes}), default=None)
    filled = [box for box in boxes if box.numel]
    if dim is not None:
        filled.sort(key=lambda box: box.offset[dim])
    for i, box in enumerate(filled):
        for other in islice(filled, i + 1, None):
            if dim is not None and other.offset[dim] >= box.offset[dim] + box.shape[dim]:
                break
            if box.intersection(other) is not None:
                return (
                    f"is stored twice: pieces of shape {list(box.shape)} at {list(box.offset)} and "
                    f"{list(other.shape)} at {list(other.offset)} overlap (shards of another degree left behind?)"
                )
    covered = sum(box.numel for box in boxes)
    # Disjoint boxes inside the shape tile it exactly when their sizes add up.
    if covered != whole.numel:
        return f"of shape {list(shape)} is incomplete: {covered} of {whole.numel} elements are stored"
    return None
