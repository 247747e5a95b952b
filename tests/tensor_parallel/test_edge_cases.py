"""Shards of different sizes, frozen weights, and other cases at the edge of the layers and the loss."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

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
from tests.live import on_live_ranks
from tests.tensor_parallel.ranks import assert_close, group, mesh, values

V, H, T = 131, 8, 60


@pytest.mark.parametrize("world_size", [2, 4])
@on_live_ranks()
def test_ranks_with_uneven_shards_have_the_same_chunks(world_size: int) -> None:
    """Catches chunks as long as a rank's own shard allows, so that ranks send messages of different sizes."""
    tp = group()
    weight = VocabSplit().shard(values(1, V, H), tp.size, tp.rank)
    with patch.dict(linear_cross_entropy._LOGITS_PER_CHUNK, cpu=1950):  # 29 rows of 66 words, 30 of 65
        loss = vocab_parallel_linear_cross_entropy(tp, values(0, T, H), weight, None, torch.arange(T), vocab_size=V)
    assert_close(loss, F.cross_entropy(values(0, T, H) @ values(1, V, H).t(), torch.arange(T)))


@pytest.mark.parametrize("world_size", [1, 2])
@on_live_ranks()
def test_autocast_gives_one_dtype_at_every_degree(world_size: int) -> None:
    """Catches a float32 bias that makes the sum over ranks float32 again: twice the memory of one rank."""
    layer = parallelize_module(RowParallelLinear(8, 4), mesh())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, 8 // world_size)).dtype == torch.bfloat16


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("splits", [False, True])
@on_live_ranks(2)
def test_a_frozen_weight_needs_no_input(is_frozen: bool, splits: bool) -> None:
    """Catches the input of a frozen layer kept, or gathered, for a gradient nobody takes, as in most of LoRA's."""
    layer = parallelize_module(ColumnParallelLinear(8, 4), mesh()).requires_grad_(not is_frozen)
    region = SequenceParallelRegion(group(), 3 * group().size) if splits else None
    x, shapes = torch.ones(3, 2, 8, requires_grad=True) * 1.0, []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = layer(x, region)
    with patch("hf_megatron.tensor_parallel.linear.start_all_gather", wraps=start_all_gather) as gather:
        output.sum().backward()
    assert (shapes.count(x.shape), gather.call_count) == ((0, 0) if is_frozen else (1, int(splits)))


@on_live_ranks(2)
def test_second_derivatives_are_refused() -> None:
    """Catches a gradient of a gradient in which a collective counts as the identity."""
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(reduce_from_tensor_parallel_region(group(), x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@on_live_ranks(4)
def test_a_layer_that_leaves_a_rank_without_work_is_refused() -> None:
    """Catches empty shards, which end in a division by zero somewhere else."""
    with pytest.raises(PartitionError, match="hold none"):
        parallelize_module(ColumnParallelLinear(8, 3), mesh())
