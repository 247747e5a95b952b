"""Random cuts and tilings for hypothesis."""

import itertools
from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hf_megatron.partition import Box, FusedSplit, Replicated, Spec, Split, VocabSplit

Shape = tuple[int, ...]

# Other processes may keep the machine busy: how long an example takes says nothing.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Spec, Shape, int]:
    """A spec, a full shape that it can cut, and a degree; some degrees leave the last ranks without anything."""
    shape = draw(st.lists(st.integers(1, 19), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    num_blocks = draw(st.integers(1, 4))
    spec = draw(st.sampled_from([Replicated(), Split(dim), VocabSplit(), FusedSplit(dim, num_blocks)]))
    if isinstance(spec, FusedSplit):
        shape[dim] *= num_blocks
    return spec, tuple(shape), draw(st.integers(1, 8))


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    """A shape and the boxes of a random grid over it, in random order; two dimensions are what TP x FSDP gives."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    edges = [sorted({0, size, *draw(st.sets(st.integers(0, size), max_size=3))}) for size in shape]
    grid = itertools.product(*(itertools.pairwise(sides) for sides in edges))
    boxes = [Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends)) for ends in grid]
    return shape, draw(st.permutations(boxes))


def times_covered(shape: Shape, boxes: Sequence[Box]) -> torch.Tensor:
    """How often each element is covered, by painting the boxes, which must lie inside the shape, one after another."""
    count = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        count[box.slices] += 1
    return count
