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
    SequenceParallelRegion,
    linear_cross_entropy,
    parallelize_module,
    reduce_from_tensor_parallel_region,
    vocab_parallel_linear_cross_entropy,
)
from hf_megatron.tensor_parallel.collectives import start_all_gather
from tests.tensor_parallel.ranks import Pool, assert_close, group, mesh, values

V, H, T = 131, 8, 60


def _loss_in_default_chunks() -> torch.Tensor:
    tp = group()
    weight = VocabSplit().shard(values(1, V, H), tp.size, tp.rank)
    with patch.dict(linear_cross_entropy._LOGITS_PER_CHUNK, cpu=1950):  # 29 rows of 66 words, 30 of 65
        return vocab_parallel_linear_cross_entropy(tp, values(0, T, H), weight, None, torch.arange(T), vocab_size=V)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_with_uneven_shards_have_the_same_chunks(pool: Pool, tp_size: int) -> None:
    """Catches chunks as long as a rank's own shard allows, so that ranks send messages of different sizes."""
    expected = F.cross_entropy(values(0, T, H) @ values(1, V, H).t(), torch.arange(T))
    for loss in pool(tp_size).run(_loss_in_default_chunks):
        assert_close(loss, expected)


def _autocast_dtype() -> torch.dtype:
    layer = parallelize_module(RowParallelLinear(8, 4), mesh())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output: torch.Tensor = layer(torch.ones(2, 8 // group().size))
    return output.dtype


@pytest.mark.parametrize("tp_size", [1, 2])
def test_autocast_gives_one_dtype_at_every_degree(pool: Pool, tp_size: int) -> None:
    """Catches a float32 bias that makes the sum over ranks float32 again: twice the memory of one rank."""
    assert pool(tp_size).run(_autocast_dtype) == [torch.bfloat16] * tp_size


def _kept_for_the_gradient(is_frozen: bool, splits: bool) -> tuple[int, int]:
    """How often the input is saved for the backward pass, and gathered in it."""
    layer = parallelize_module(ColumnParallelLinear(8, 4), mesh()).requires_grad_(not is_frozen)
    region = SequenceParallelRegion(group(), 2 * group().size) if splits else None
    x, shapes = torch.ones(3, 2, 8, requires_grad=True) * 1.0, []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = layer(x, region)
    with patch("hf_megatron.tensor_parallel.linear.start_all_gather", wraps=start_all_gather) as gather:
        output.sum().backward()
    return shapes.count(x.shape), gather.call_count


@pytest.mark.parametrize("splits", [False, True])
def test_a_frozen_weight_needs_no_input(pool: Pool, splits: bool) -> None:
    """Catches the input of a frozen layer kept, or gathered, for a gradient nobody takes, as in most of LoRA's."""
    assert pool(2).run(_kept_for_the_gradient, True, splits) == [(0, 0)] * 2
    assert pool(2).run(_kept_for_the_gradient, False, splits) == [(1, int(splits))] * 2


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
