"""Which attention heads a rank computes, and which columns of them it holds.

The columns of queries, keys and values are cut as ``torch.chunk`` cuts them, so that all ranks multiply matrices of the
same size. Where the degree does not divide the heads, a cut runs through a head, which then lies on two neighbouring
ranks: 25 heads over 2 ranks are 12.5 each, and both compute the 13th.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_megatron.partition.spec import chunk_range


@dataclass(frozen=True, slots=True)
class HeadCut:
    """The cut of N heads of D columns over the ranks, as one rank sees it.

    Attributes:
        num_heads: N, over all ranks.
        head_dim: D.
        tp_size: Number of ranks, at most N.
        tp_rank: This rank.
    """

    num_heads: int
    head_dim: int
    tp_size: int
    tp_rank: int

    @property
    def heads(self) -> range:
        """The heads that this rank computes: those of which it holds a column."""
        start, stop = self._held
        return range(start // self.head_dim, -(-stop // self.head_dim))

    @property
    def first_here(self) -> range:
        """The heads whose first column this rank holds. Over all ranks, these are each head once."""
        start, stop = self._held
        return range(-(-start // self.head_dim), -(-stop // self.head_dim))

    @property
    def columns(self) -> slice:
        """The columns that this rank holds, among those of the heads that it computes."""
        start, stop = self._held
        first = self.heads.start * self.head_dim
        return slice(start - first, stop - first)

    @property
    def is_shared(self) -> bool:
        """Whether some head lies on two ranks."""
        return chunk_range(self.num_heads * self.head_dim, self.tp_size, 0)[1] % self.head_dim != 0

    @property
    def lacking(self) -> tuple[int, int]:
        """How many columns of its heads this rank lacks: those on the left neighbour and those on the right one."""
        return self.columns.start, len(self.heads) * self.head_dim - self.columns.stop

    @property
    def lent(self) -> tuple[int, int]:
        """How many of this rank's columns the left neighbour lacks, and how many the right one."""
        left, right = self.tp_rank - 1, self.tp_rank + 1
        return (
            self._on(left).lacking[1] if left >= 0 else 0,
            self._on(right).lacking[0] if right < self.tp_size else 0,
        )

    @property
    def _held(self) -> tuple[int, int]:
        return chunk_range(self.num_heads * self.head_dim, self.tp_size, self.tp_rank)

    def _on(self, rank: int) -> HeadCut:
        return HeadCut(self.num_heads, self.head_dim, self.tp_size, rank)
