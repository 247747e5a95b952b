"""The embedding that is cut along the vocabulary."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hf_megatron.partition import VocabSplit
from hf_megatron.tensor_parallel import VocabParallelEmbedding, parallelize_module
from tests.live import on_live_ranks
from tests.tensor_parallel.ranks import TP_SIZES, assert_close, mesh, values

V, H = 11, 4  # over 4 ranks: 3, 3, 3, 2 rows
IDS = torch.tensor([[0, 10, 3, 5, 0, 1], [9, 3, 6, 2, 1, 10]])


@pytest.mark.parametrize("padding_idx", [None, 0, 3, 5, 10])
@pytest.mark.parametrize("world_size", TP_SIZES)
@on_live_ranks()
def test_embedding_equals_the_whole_one(world_size: int, padding_idx: int | None) -> None:
    """Catches rows of another rank, gradients of others' tokens in this rank's first row, a padding row that learns,
    and a global padding index that freezes the row of a real token on every rank but the first."""
    embedding: Any = VocabParallelEmbedding(V, H, padding_idx=padding_idx, dtype=torch.float64)
    with torch.no_grad():
        embedding.weight.copy_(values(0, V, H))
    parallelize_module(embedding, mesh())
    weight = values(0, V, H).requires_grad_()
    output, expected = embedding(IDS), F.embedding(IDS, weight, padding_idx)
    assert torch.equal(output, expected)
    for result in (output, expected):
        result.backward(values(1, *IDS.shape, H))
    assert weight.grad is not None
    tp = embedding.tp_group
    assert_close(embedding.weight.grad.to_local(), VocabSplit().shard(weight.grad, tp.size, tp.rank))


@pytest.mark.parametrize("world_size", TP_SIZES)
@on_live_ranks()
def test_unusual_ids(world_size: int) -> None:
    """Catches NaN of a row of others times zero, a minimum of no ids, and an id of no shard that becomes zeros."""
    embedding = VocabParallelEmbedding(V, H)
    with torch.no_grad():
        embedding.weight[[0, 3, 6, 9]] = float("nan")  # not looked up
    parallelize_module(embedding, mesh())
    assert embedding(torch.tensor([[1, 4, 7, 10]])).isfinite().all()
    assert embedding(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, H)
    for outside in (-1, V):
        with pytest.raises(IndexError, match=r"" if embedding.tp_group.size == 1 else r"embedding has 11 rows; check"):
            embedding(torch.tensor([[2, outside]]))
