"""Sequences in a random order that is nowhere listed, of several sources by weight."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_megatron.errors import DataError
from hf_megatron.paper.data import PackedDocuments, ShuffledBlend, open_token_files
from hf_megatron.paper.data.blending import Permutation
from tests.data.indexed import write_pair


def _numbers(first: int, count: int) -> PackedDocuments:
    """Sequences of two tokens, of which the second tells which it is."""
    return PackedDocuments([list(range(first, first + count))], length=2, end_of_document=first + count)


def _pass(blend: ShuffledBlend, epoch: int) -> list[int]:
    blend.set_epoch(epoch)
    return [int(blend[i]["labels"][1]) for i in range(len(blend))]


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.integers())
def test_a_permutation_has_each_number_once(size: int, key: int) -> None:
    """Catches numbers left out or given twice at a size that is no power of two."""
    assert sorted(map(Permutation(size, key).__getitem__, range(size))) == list(range(size))


@pytest.mark.parametrize("size", [5, 12])
def test_all_orders_are_about_as_likely(size: int) -> None:
    """Catches an order that is none, or prefers some places: chi-squared of places, and of the gaps of neighbours."""
    trials, places, gaps = 1000, Counter[tuple[int, int]](), Counter[int]()
    for key in range(trials):
        order = [Permutation(size, 3, key)[i] for i in range(size)]
        places.update(enumerate(order))
        gaps.update([(order[1] - order[0]) % size])
    for found, cells, freedom in ((places, size * size, (size - 1) ** 2), (gaps, size - 1, size - 2)):
        expected = sum(found.values()) / cells
        squares = sum((count - expected) ** 2 for count in found.values()) + (cells - len(found)) * expected**2
        assert squares / expected < freedom + 5 * (2 * freedom) ** 0.5


def test_passes_differ_and_repeat() -> None:
    """Catches an order that is the same in each pass, another for each object, or not decided by the seed."""
    blend = ShuffledBlend([_numbers(0, 50)], seed=1)
    first, second = _pass(blend, 0), _pass(blend, 1)
    assert sorted(first) == sorted(second) == list(range(1, 51))
    assert len({tuple(first), tuple(second), tuple(range(1, 51))}) == 3
    assert _pass(ShuffledBlend([_numbers(0, 50)], seed=1), 1) == second
    assert _pass(ShuffledBlend([_numbers(0, 50)], seed=2), 0) != first


def test_what_a_pass_leaves_out_comes_next() -> None:
    """Catches steps that are not whole, and sequences that are repeated before all were seen."""
    blend = ShuffledBlend([_numbers(0, 50)], seed=1, multiple_of=16)
    assert len(blend) == 64
    seen = [number for epoch in range(25) for number in _pass(blend, epoch)]
    assert set(Counter(seen).values()) == {32}
    assert set(Counter(_pass(blend, 0)).values()) == {1, 2}


def test_weights_decide_how_many_of_each() -> None:
    """Catches a mixture of other proportions, sources that are not mixed, and a large one that begins anew."""
    sources = [_numbers(0, 40), _numbers(1000, 300)]
    blend = ShuffledBlend(sources, [2, 3], seed=1)
    assert len(blend) == 100  # where the first source ends
    seen = Counter[int]()
    for epoch in range(5):
        numbers = _pass(blend, epoch)
        seen.update(numbers)
        assert sum(number < 1000 for number in numbers) == 40
        assert 10 < sum(number < 1000 for number in numbers[:50]) < 30
    assert {count for number, count in seen.items() if number > 1000} == {1}
    assert len([number for number in seen if number > 1000]) == 300
    by_size = _pass(ShuffledBlend(sources, seed=1), 0)
    assert sorted(by_size) == [*range(1, 41), *range(1001, 1301)]


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 1e-9]])
def test_weights_that_choose_nothing_are_refused(weights: list[float]) -> None:
    """Catches a source that is silently never used."""
    with pytest.raises(DataError, match=r"weight"):
        ShuffledBlend([_numbers(0, 10), _numbers(0, 10)], weights, seed=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_that_outlive_a_pass_see_the_next(workers: int) -> None:
    """Catches a second pass in the order of the first."""
    blend = ShuffledBlend([_numbers(0, 50)], seed=1)
    loader = torch.utils.data.DataLoader(blend, batch_size=10, num_workers=workers, persistent_workers=workers > 0)
    for epoch in (0, 1, 2):
        blend.set_epoch(epoch)
        loaded = [number for batch in loader for number in batch["labels"][:, 1].tolist()]
        assert loaded == _pass(blend, epoch)


def test_files_by_weight_as_megatron_lm_names_them(tmp_path: Path) -> None:
    """Catches weights that are taken for files, and files for weights."""
    for i in (0, 1):
        write_pair(tmp_path / str(i), [range(500 * i, 500 * i + 101)])
    names = [str(tmp_path / "0"), str(tmp_path / "1.bin")]
    options = {"seed": 1, "length": 2, "end_of_document": 9}
    assert sorted(_pass(open_token_files(names, **options), 0)) == [*range(1, 101), *range(501, 601)]
    blend = open_token_files(["0.25", names[0], "0.75", names[1]], **options)
    assert Counter(number < 500 for number in _pass(blend, 0)) == {False: 100, True: 34}
    with pytest.raises(DataError, match=r"3\.bin is missing"):
        open_token_files(["3", *names], **options)
