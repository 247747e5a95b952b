"""Shards of different sizes, frozen weights, and other cases at the edge of the layers and the loss."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_megatron.errors import PartitionError
from hf_megatron.partition import VocabSplit
from hf_megatron.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    linear_cross_entropy,
    parallelize_module,
    reduce_from_tensor_parallel_region,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from tests.tensor_parallel.ranks import Pool, assert_close, group, mesh

V, H, T = 131, 8, 60


def _values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def _loss_in_default_chunks() -> torch.Tensor:
    tp = group()
    weight = VocabSplit().shard(_values(V, H), tp.size, tp.rank)
    target = torch.arange(T).remainder(V)
    with patch.dict(linear_cross_entropy._LOGITS_PER_CHUNK, cpu=1950):  # 29 rows of 66 words, 30 of 65
        return vocab_parallel_linear_cross_entropy(tp, _values(T, H), weight, None, target, vocab_size=V)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_with_uneven_shards_have_the_same_chunks(pool: Pool, tp_size: int) -> None:
    """Catches chunks as long as a rank's own shard allows, so that ranks send messages of different sizes."""
    expected = F.cross_entropy(_values(T, H) @ _values(V, H).t(), torch.arange(T).remainder(V))
    for loss in pool(tp_size).run(_loss_in_default_chunks):
        assert_close(loss, expected)


def _loss_with_ruled_out_words() -> torch.Tensor:
    tp, logits = group(), _values(3, V)
    logits[:, : V - 5] = -torch.inf  # all of the first rank's
    return vocab_parallel_cross_entropy(tp, _shard_of(logits), torch.full((3,), V - 1), vocab_size=V)


def _shard_of(logits: torch.Tensor) -> torch.Tensor:
    tp = group()
    return VocabSplit().shard(logits.t(), tp.size, tp.rank).t()


def test_a_rank_may_have_no_likely_word(pool: Pool) -> None:
    """Catches nan where all logits of one rank are -inf, as a logits processor makes them."""
    logits = _values(3, V)
    logits[:, : V - 5] = -torch.inf
    for loss in pool(2).run(_loss_with_ruled_out_words):
        assert_close(loss, F.cross_entropy(logits, torch.full((3,), V - 1)))


def _autocast_dtype() -> torch.dtype:
    layer = parallelize_module(RowParallelLinear(8, 4), mesh())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output: torch.Tensor = layer(torch.ones(2, 8 // group().size))
    return output.dtype


@pytest.mark.parametrize("tp_size", [1, 2])
def test_autocast_gives_one_dtype_at_every_degree(pool: Pool, tp_size: int) -> None:
    """Catches a float32 bias that makes the sum over ranks float32 again: twice the memory of one rank."""
    assert pool(tp_size).run(_autocast_dtype) == [torch.bfloat16] * tp_size


def _num_saved(is_frozen: bool) -> int:
    layer = parallelize_module(ColumnParallelLinear(8, 4), mesh())
    layer.requires_grad_(not is_frozen)
    x, shapes = torch.ones(3, 8, requires_grad=True) * 1.0, []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        layer(x)
    return shapes.count(x.shape)


def test_a_frozen_weight_keeps_no_activations(pool: Pool) -> None:
    """Catches the input of a frozen layer kept for a gradient that nobody takes, as in most layers under LoRA."""
    assert pool(2).run(_num_saved, True) == [0, 0]
    assert pool(2).run(_num_saved, False) == [1, 1]


def _differentiate_twice() -> str:
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(reduce_from_tensor_parallel_region(group(), x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    return "raised"


def test_second_derivatives_are_refused(pool: Pool) -> None:
    """Catches a gradient of a gradient in which a collective counts as the identity."""
    assert pool(2).run(_differentiate_twice) == ["raised"] * 2


def _parallelize(module: nn.Module) -> str:
    with pytest.raises(PartitionError, match="hold none"):
        parallelize_module(module, mesh())
    return "refused"


def test_a_layer_that_leaves_a_rank_without_work_is_refused(pool: Pool) -> None:
    """Catches empty shards, which end in a division by zero somewhere else."""
    assert pool(4).run(_parallelize, ColumnParallelLinear(8, 3)) == ["refused"] * 4
