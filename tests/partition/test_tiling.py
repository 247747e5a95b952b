"""Whether the pieces of a stored tensor are exactly the tensor: what stands between a bad directory and nonsense."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_megatron.partition import Box, FusedSplit, Split, tiling_error
from tests.partition.cuts import Shape, is_inside, tilings, times_covered, unhurried


def _tiles(shape: Shape, boxes: Sequence[Box]) -> bool:
    """The truth, by painting."""
    return all(is_inside(shape, box) for box in boxes) and bool((times_covered(shape, boxes) == 1).all())


def _shifted(box: Box, steps: Sequence[int]) -> Box:
    return Box(tuple(start + step for start, step in zip(box.offset, steps, strict=True)), box.shape)


def _enlarged(box: Box, steps: Sequence[int]) -> Box:
    return Box(box.offset, tuple(max(0, size + step) for size, step in zip(box.shape, steps, strict=True)))


@unhurried
@given(tilings(), st.data())
def test_a_dropped_piece_is_found(tiling: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    """Catches a missing shard that passes for a smaller tensor; the message gives the numbers."""
    shape, boxes = tiling
    dropped = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
    numel = Box.whole(shape).numel
    assert tiling_error(shape, boxes) == (
        f"of shape {list(shape)} is incomplete: {numel - dropped.numel} of {numel} elements are stored"
    )


@unhurried
@given(tilings(), st.data())
def test_a_doubled_piece_is_found(tiling: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    """Catches a piece that is there twice, of which nobody knows which one is meant."""
    shape, boxes = tiling
    boxes.insert(data.draw(st.integers(0, len(boxes))), data.draw(st.sampled_from(boxes)))
    assert "is stored twice" in str(tiling_error(shape, boxes))


@unhurried
@given(tilings(), st.data())
def test_verdict_on_any_damage_is_the_painted_one(tiling: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    """Catches a good directory refused, and damage that passes: offsets that are wrong or negative, with or without
    more damage that cancels out in the sums, as where one piece is gone and another there twice."""
    shape, boxes = tiling
    for _ in range(data.draw(st.integers(0, min(3, len(boxes))))):
        piece = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        steps = [data.draw(st.integers(-3, 3)) for _ in shape]
        boxes += data.draw(st.sampled_from([[], [piece, piece], [_shifted(piece, steps)], [_enlarged(piece, steps)]]))
    assert (tiling_error(shape, boxes) is None) == _tiles(shape, boxes)


@pytest.mark.parametrize("spec", [Split(0), FusedSplit(0, 3)])
@pytest.mark.parametrize("stale_degree", [3, 4, 8])
def test_shards_of_another_degree_are_found(spec: Split | FusedSplit, stale_degree: int) -> None:
    """Catches what a save at one degree over one at a higher degree leaves behind."""
    shape = (132, 8)
    current, stale = spec.stored_boxes(shape, 2), spec.stored_boxes(shape, stale_degree)[2:]
    assert "is stored twice" in str(tiling_error(shape, current + stale))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            [Box((0, 0), (4, 4)), Box((0, 3), (4, 3))],
            "is stored twice: pieces of shape [4, 4] at [0, 0] and [4, 3] at [0, 3] overlap "
            "(shards of another degree left behind?)",
        ),
        (
            [Box((0, 0), (4, 3)), Box((0, 2), (4, 3))],  # the sizes add up
            "is stored twice: pieces of shape [4, 3] at [0, 0] and [4, 3] at [0, 2] overlap "
            "(shards of another degree left behind?)",
        ),
        ([Box((0, 0), (4, 4)), Box((0, 4), (4, 3))], "a piece of shape [4, 3] at [0, 4], outside of its shape [4, 6]"),
        (
            [Box((0, -1), (4, 5)), Box((0, 5), (4, 1))],
            "a piece of shape [4, 5] at [0, -1], outside of its shape [4, 6]",
        ),
        ([Box((0,), (24,))], "is stored with 1 dimensions where 2 are expected"),
    ],
)
def test_messages_name_the_piece(boxes: list[Box], message: str) -> None:
    """Catches a message with which nobody finds the file."""
    assert str(tiling_error((4, 6), boxes)).removeprefix("has ") == message
