"""Which heads a rank computes, at every degree."""

from __future__ import annotations

import pytest

from hf_megatron.partition import HeadCut, chunk_range

_CASES = [
    (num_heads, head_dim, tp_size)
    for num_heads, head_dim in ((25, 64), (25, 8), (12, 64), (12, 4), (3, 8), (7, 2), (5, 1), (16, 1))
    for tp_size in range(1, num_heads + 1)
    if chunk_range(num_heads * head_dim, tp_size, tp_size - 1)[0] < num_heads * head_dim
]


@pytest.mark.parametrize(("num_heads", "head_dim", "tp_size"), _CASES)
def test_every_column_is_there_once(num_heads: int, head_dim: int, tp_size: int) -> None:
    """Catches a head that is missing or reported twice, a column of the wrong rank, and a needless send."""
    cuts = [HeadCut(num_heads, head_dim, tp_size, rank) for rank in range(tp_size)]
    assert [head for cut in cuts for head in cut.first_here] == list(range(num_heads))
    held = [
        column + cut.heads.start * head_dim for cut in cuts for column in range(cut.columns.start, cut.columns.stop)
    ]
    assert held == list(range(num_heads * head_dim))
    for rank, cut in enumerate(cuts):
        before, after = cut.lacking
        assert 0 <= before < head_dim
        assert 0 <= after < head_dim
        assert before == (cuts[rank - 1].lent[1] if rank else 0)
        assert after == (cuts[rank + 1].lent[0] if rank + 1 < tp_size else 0)
        # What is lent was held, and no column is lent from further away.
        assert sum(cut.lent) <= 2 * (cut.columns.stop - cut.columns.start)
        assert max(cut.lent) <= cut.columns.stop - cut.columns.start
    assert cuts[0].is_shared == any(sum(cut.lacking) for cut in cuts)
    if num_heads % tp_size == 0:
        assert not cuts[0].is_shared
        assert [len(cut.heads) for cut in cuts] == [num_heads // tp_size] * tp_size
