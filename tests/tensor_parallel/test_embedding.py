"""The embedding that is cut along the vocabulary, and the modules that every rank holds whole."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from hf_megatron.partition import VocabSplit, chunk_range
from hf_megatron.tensor_parallel import (
    ReplicatedEmbedding,
    ReplicatedLayerNorm,
    ReplicatedLinear,
    VocabParallelEmbedding,
    local,
    parallelize_module,
    reduce_from_tensor_parallel_region,
)
from hf_megatron.tensor_parallel.cpu import TiedGradient
from tests.tensor_parallel.ranks import TP_SIZES, Pool, assert_close, mesh, proven, same_on_all_ranks

V, H = 11, 4  # over 4 ranks: 3, 3, 3, 2 rows
IDS = torch.tensor([[0, 10, 3, 5, 0, 1], [9, 3, 6, 2, 1, 10]])


def _values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class GlobalPaddingIndex(VocabParallelEmbedding):
    """The defect: the global padding index is given to the look-up in the local rows."""

    def forward(self, input_ids: torch.Tensor | None = None, tied: TiedGradient | None = None) -> torch.Tensor:
        assert input_ids is not None
        start, stop = chunk_range(self.num_embeddings, self.tp_group.size, self.tp_group.rank)
        is_mine = (input_ids >= start) & (input_ids < stop)
        local_ids = torch.where(is_mine, input_ids - start, 0)
        embedded = F.embedding(local_ids, local(self.weight), self.padding_idx)
        return reduce_from_tensor_parallel_region(self.tp_group, embedded.masked_fill(~is_mine[..., None], 0.0))


Embedding = type[VocabParallelEmbedding]


def _embed(embedding_class: Embedding, padding_idx: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    embedding = embedding_class(V, H, padding_idx=padding_idx, dtype=torch.float64)
    with torch.no_grad():
        embedding.weight.copy_(_values(0, V, H))
    parallelize_module(embedding, mesh())
    output = embedding(IDS)
    output.backward(_values(1, *IDS.shape, H))
    gradient = embedding.weight.grad
    assert isinstance(gradient, DTensor)
    return output.detach(), gradient.to_local()


def _check_embedding(pool: Pool, tp_size: int, embedding_class: Embedding, padding_idx: int | None) -> None:
    weight = _values(0, V, H).requires_grad_()
    expected = F.embedding(IDS, weight, padding_idx)
    expected.backward(_values(1, *IDS.shape, H))
    assert weight.grad is not None
    results = pool(tp_size).run(_embed, embedding_class, padding_idx)
    assert torch.equal(same_on_all_ranks([output for output, _ in results]), expected)
    assert_close(VocabSplit().merge([gradient for _, gradient in results]), weight.grad)


@pytest.mark.parametrize("padding_idx", [None, 0, 3, 5, 10])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_embedding_equals_the_whole_one(pool: Pool, tp_size: int, padding_idx: int | None) -> None:
    """Catches rows of another rank, gradients of others' tokens in this rank's first row, and a padding row that
    learns, wherever it lies: on the first or the last rank, first or last among its rows."""
    _check_embedding(pool, tp_size, VocabParallelEmbedding, padding_idx)


@pytest.mark.parametrize(
    ("embedding_class", "is_defective"), [(VocabParallelEmbedding, False), (GlobalPaddingIndex, True)]
)
def test_padding_freezes_no_row_of_another_rank(pool: Pool, embedding_class: Embedding, is_defective: bool) -> None:
    """Catches a global padding index that is used among local rows: every rank but the first would freeze the row of
    a real token, here token 6, of which there is no other sign than that it never learns."""
    with proven(is_defective):
        _check_embedding(pool, 2, embedding_class, padding_idx=0)


def _embed_outside(ids: list[int]) -> str:
    embedding = parallelize_module(VocabParallelEmbedding(V, H), mesh())
    with pytest.raises(IndexError) as caught:
        embedding(torch.tensor([ids]))
    return str(caught.value)


@pytest.mark.parametrize("outside", [-1, V])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_an_id_outside_of_the_vocabulary_raises(pool: Pool, tp_size: int, outside: int) -> None:
    """Catches an id that belongs to no shard and silently becomes a row of zeros, as on no single process."""
    messages = pool(tp_size).run(_embed_outside, [2, outside])
    if tp_size > 1:
        low, high = sorted([2, outside])
        assert (
            messages
            == [
                f"token ids from {low} to {high} were given, but the embedding has 11 rows; check that the tokenizer "
                "belongs to this model."
            ]
            * tp_size
        )


def _embed_beside_nan_rows() -> torch.Tensor:
    embedding = VocabParallelEmbedding(V, H)
    with torch.no_grad():
        embedding.weight[[0, 3, 6, 9]] = float("nan")
    output: torch.Tensor = parallelize_module(embedding, mesh())(torch.tensor([[1, 4, 7, 10]]))
    return output.detach()


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_rows_that_are_not_looked_up_do_not_matter(pool: Pool, tp_size: int) -> None:
    """Catches a product with zero where others' tokens are masked: NaN in a rank's first row would spread to all."""
    assert all(bool(output.isfinite().all()) for output in pool(tp_size).run(_embed_beside_nan_rows))


def _embed_nothing() -> torch.Size:
    output: torch.Tensor = parallelize_module(VocabParallelEmbedding(V, H), mesh())(
        torch.empty(0, 3, dtype=torch.int64)
    )
    return output.shape


def test_no_ids_are_fine(pool: Pool) -> None:
    """Catches a check of the smallest and largest id of an empty batch."""
    assert pool(2).run(_embed_nothing) == [(0, 3, H)] * 2


def _replicated_modules() -> list[tuple[nn.Module, nn.Module, torch.Tensor]]:
    """Ours, the stock one it stands for, and an input."""
    x = _values(0, 2, 3, H)
    return [
        (ReplicatedLinear(H, 5), nn.Linear(H, 5), x),
        (ReplicatedLinear(H, 5, bias=False), nn.Linear(H, 5, bias=False), x),
        (ReplicatedLayerNorm(H, eps=1e-3), nn.LayerNorm(H, eps=1e-3), x),
        (ReplicatedLayerNorm(H, bias=False), nn.LayerNorm(H, bias=False), x),
        (ReplicatedEmbedding(V, H, padding_idx=3), nn.Embedding(V, H, padding_idx=3), IDS),
    ]


def _compare_replicated_modules() -> int:
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        for ours, stock, x in _replicated_modules():
            ours.double()
            stock.double()
            ours.load_state_dict(stock.state_dict())
            parallelize_module(ours, mesh())
            output, expected = ours(x), stock(x)
            assert torch.equal(output, expected)
            ((output + 1) ** 3).sum().backward()
            ((expected + 1) ** 3).sum().backward()
            for parameter, reference in zip(ours.parameters(), stock.parameters(), strict=True):
                assert isinstance(parameter.grad, DTensor)
                assert parameter.grad.placements == parameter.placements  # type: ignore[attr-defined]
                assert reference.grad is not None
                assert torch.equal(parameter.grad.to_local(), reference.grad)
    return all_reduce.call_count


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_modules_held_whole_equal_the_stock_ones(pool: Pool, tp_size: int) -> None:
    """Catches a gradient that is summed though it is whole, an option that is not passed on, and communication."""
    assert pool(tp_size).run(_compare_replicated_modules) == [0] * tp_size
