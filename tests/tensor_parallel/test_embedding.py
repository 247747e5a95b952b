"""The embedding that is cut along the vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from hf_megatron.partition import VocabSplit
from hf_megatron.tensor_parallel import VocabParallelEmbedding, parallelize_module
from tests.tensor_parallel.ranks import TP_SIZES, Pool, assert_close, mesh, same_on_all_ranks, values

V, H = 11, 4  # over 4 ranks: 3, 3, 3, 2 rows
IDS = torch.tensor([[0, 10, 3, 5, 0, 1], [9, 3, 6, 2, 1, 10]])


def _embed(padding_idx: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    embedding = VocabParallelEmbedding(V, H, padding_idx=padding_idx, dtype=torch.float64)
    with torch.no_grad():
        embedding.weight.copy_(values(0, V, H))
    parallelize_module(embedding, mesh())
    output = embedding(IDS)
    output.backward(values(1, *IDS.shape, H))
    gradient = embedding.weight.grad
    assert isinstance(gradient, DTensor)
    return output.detach(), gradient.to_local()


@pytest.mark.parametrize("padding_idx", [None, 0, 3, 5, 10])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_embedding_equals_the_whole_one(pool: Pool, tp_size: int, padding_idx: int | None) -> None:
    """Catches rows of another rank, gradients of others' tokens in this rank's first row, a padding row that learns,
    and a global padding index that freezes the row of a real token on every rank but the first."""
    weight = values(0, V, H).requires_grad_()
    expected = F.embedding(IDS, weight, padding_idx)
    expected.backward(values(1, *IDS.shape, H))
    assert weight.grad is not None
    outputs, gradients = zip(*pool(tp_size).run(_embed, padding_idx), strict=True)
    assert torch.equal(same_on_all_ranks(outputs), expected)
    assert_close(VocabSplit().merge(list(gradients)), weight.grad)


def _embed_unusual_ids() -> None:
    embedding = VocabParallelEmbedding(V, H)
    with torch.no_grad():
        embedding.weight[[0, 3, 6, 9]] = float("nan")  # not looked up
    parallelize_module(embedding, mesh())
    assert embedding(torch.tensor([[1, 4, 7, 10]])).isfinite().all()
    assert embedding(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, H)
    for outside in (-1, V):
        with pytest.raises(IndexError, match=r"" if embedding.tp_group.size == 1 else r"embedding has 11 rows; check"):
            embedding(torch.tensor([[2, outside]]))


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_unusual_ids(pool: Pool, tp_size: int) -> None:
    """Catches NaN that a product with zero spreads from a row of others, a minimum of no ids, and an id of no shard
    that becomes zeros."""
    pool(tp_size).run(_embed_unusual_ids)
