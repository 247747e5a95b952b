"""Whether the pieces of a stored tensor are exactly the tensor: what stands between a bad directory and nonsense."""

import operator
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_megatron.partition import Box, tiling_error
from tests.partition.cuts import Shape, tilings, times_covered, unhurried


def _tiles(shape: Shape, boxes: Sequence[Box]) -> bool:
    """The truth, by painting."""
    ends = [end for box in boxes for end in zip(box.offset, box.shape, shape, strict=True)]
    are_inside = all(start >= 0 and start + size <= n for start, size, n in ends)
    return are_inside and bool((times_covered(shape, boxes) == 1).all())


def _moved(box: Box, start: Sequence[int], size: Sequence[int]) -> Box:
    """Shifted, and enlarged."""
    offset = tuple(map(operator.add, box.offset, start))
    return Box(offset, tuple(max(0, n + more) for n, more in zip(box.shape, size, strict=True)))


@unhurried
@given(tilings(), st.data())
def test_verdict_on_any_damage_is_the_painted_one(tiling: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    """Catches a good directory refused, and damage that passes, such as one piece gone and another there twice."""
    shape, boxes = tiling
    none = [0] * len(shape)
    for _ in range(data.draw(st.integers(0, min(3, len(boxes))))):
        piece = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        steps = [data.draw(st.integers(-3, 3)) for _ in shape]
        boxes += data.draw(
            st.sampled_from([[], [piece, piece], [_moved(piece, steps, none)], [_moved(piece, none, steps)]])
        )
    assert (tiling_error(shape, boxes) is None) == _tiles(shape, boxes)


def test_pieces_that_no_cut_separates() -> None:
    """Catches a check that takes pieces for cells of a grid: these go around the one in the middle."""
    around = [Box((0, 0), (3, 1)), Box((3, 0), (1, 5)), Box((1, 5), (3, 1)), Box((0, 1), (1, 5))]
    assert tiling_error((4, 6), [*around, Box((1, 1), (2, 4))]) is None
    assert tiling_error((4, 6), [*around, Box((1, 1), (2, 3))]) is not None


def test_more_dimensions_than_any_model_is_cut_along() -> None:
    """Catches work that doubles with every dimension, without an end."""
    assert "cut along 5 dimensions" in str(tiling_error((2,) * 5, [Box((0,) * 5, (1,) * 5)]))


def test_many_pieces_with_an_error_in_them() -> None:
    """Catches pieces compared with all others, which takes minutes, and a wrong error where none names the pieces."""
    grid = [Box((i, j), (1, 1)) for i in range(300) for j in range(300)]
    started = time.process_time()
    assert tiling_error((300, 300), grid) is None
    assert "89999 of 90000 elements" in str(tiling_error((300, 300), grid[:-1]))
    assert "some overlap" in str(tiling_error((300, 300), [*grid, grid[-1]]))
    assert time.process_time() - started < 15


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
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
        ([Box((0, 0), (4, 4))], "of shape [4, 6] is incomplete: 16 of 24 elements are stored"),
        (
            [Box((0, 0), (3, 1)), Box((3, 0), (1, 5)), Box((1, 5), (3, 1)), Box((0, 1), (1, 5)), Box((0, 1), (2, 4))],
            "is stored twice: pieces of shape [1, 5] at [0, 1] and [2, 4] at [0, 1] overlap "
            "(shards of another degree left behind?)",
        ),
        ([Box((0,), (24,))], "is stored with 1 dimensions where 2 are expected"),
    ],
)
def test_messages_name_the_piece(boxes: list[Box], message: str) -> None:
    """Catches a message with which nobody finds the file."""
    assert str(tiling_error((4, 6), boxes)).removeprefix("has ") == message
