"""The region functions: what they do forward and backward, and that they leave alone what they were given."""

from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hf_megatron.partition import Split
from hf_megatron.tensor_parallel import (
    SINGLE,
    TensorParallelGroup,
    copy_to_tensor_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_parallel_region,
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_parallel_region,
)
from tests.live import on_live_ranks
from tests.models.reference import assert_same_on_all_ranks
from tests.tensor_parallel.ranks import TP_SIZES, assert_close, group, values

SHAPE = (5, 6, 7)  # over 4 ranks: 2, 2, 1, 0; 2, 2, 2, 0; 2, 2, 2, 1


@dataclass(frozen=True)
class Region:
    """A function of a group, a tensor and a dimension, and what it means."""

    function: Callable[[TensorParallelGroup, torch.Tensor, int], torch.Tensor]
    takes_part: bool = False  # of a rank, or a whole tensor
    gives_part: bool = False
    sums: str = ""  # the direction in which it adds up what the ranks have


REGIONS = {
    "reduce": Region(lambda tp, x, dim: reduce_from_tensor_parallel_region(tp, x), sums="forward"),
    "gather": Region(
        lambda tp, x, dim: gather_from_tensor_parallel_region(tp, x, dim=dim, size=SHAPE[dim]), takes_part=True
    ),
    "scatter": Region(lambda tp, x, dim: scatter_to_tensor_parallel_region(tp, x, dim=dim), gives_part=True),
    "enter": Region(
        lambda tp, x, dim: gather_from_sequence_parallel_region(tp, x, dim=dim, size=SHAPE[dim]),
        takes_part=True,
        sums="backward",
    ),
    "leave": Region(
        lambda tp, x, dim: reduce_scatter_to_sequence_parallel_region(tp, x, dim=dim), gives_part=True, sums="forward"
    ),
}


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("world_size", TP_SIZES)
@on_live_ranks()
def test_regions_sum_cut_and_join(world_size: int, name: str, dim: int) -> None:
    """Catches sums left out or doubled, another rank's part, padding, work in place, a slice that holds the whole."""
    tp, region = group(), REGIONS[name]

    def mine(whole: torch.Tensor, is_part: bool) -> torch.Tensor:
        return Split(dim % 3).shard(whole, tp.size, tp.rank).clone() if is_part else whole

    def given(seed: int, is_part: bool, direction: str) -> torch.Tensor:
        return mine(values(seed + (tp.rank if region.sums == direction else 0), *SHAPE), is_part)

    source = given(0, region.takes_part, "forward").requires_grad_()
    argument = source.mT.clone(memory_format=torch.contiguous_format).mT  # not contiguous
    output = region.function(tp, argument, dim)
    gradient = given(10, region.gives_part, "backward")
    output.backward(gradient)
    assert torch.equal(argument, source), "the argument has changed"
    assert torch.equal(gradient, given(10, region.gives_part, "backward")), "the gradient has changed"
    assert source.grad is not None
    for found, seed, is_part, direction in (
        (output.detach(), 0, region.gives_part, "forward"),
        (source.grad, 10, region.takes_part, "backward"),
    ):
        is_sum = region.sums == direction
        whole = torch.stack([values(seed + rank, *SHAPE) for rank in range(tp.size if is_sum else 1)]).sum(0)
        assert_close(found, mine(whole, is_part), 1e-12 if is_sum else 0.0)
        if not is_part:
            assert_same_on_all_ranks(direction, found)
    assert name != "scatter" or output.untyped_storage().nbytes() == 8 * output.numel()


def test_one_rank_communicates_nothing() -> None:
    """Catches copies and collectives, which need a process group, in a plain process."""
    x = values(0, *SHAPE)
    assert copy_to_tensor_parallel_region(SINGLE, x, x)[1] is x
    assert all(region.function(SINGLE, x, 0) is x for region in REGIONS.values())


@pytest.mark.parametrize("world_size", TP_SIZES)
@on_live_ranks()
def test_copy_sums_the_gradients(world_size: int) -> None:
    """Catches gradients that stay partial sums, get mixed up between tensors or lose their dtype, and a collective
    for each tensor where one for each dtype does; the last tensor is not used, and one is frozen."""
    dtypes = [torch.float64, torch.float32, torch.float64, torch.bfloat16, torch.float32]
    inputs = [values(i, i + 2, 3, dtype=dtype).requires_grad_() for i, dtype in enumerate(dtypes)]
    frozen = values(50, 2, 3, dtype=torch.float16)  # the only one of this dtype: needs no collective
    outputs = copy_to_tensor_parallel_region(group(), *inputs, frozen)
    assert all(torch.equal(output, x) for output, x in zip(outputs, [*inputs, frozen], strict=True))
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        torch.stack([(x * (dist.get_rank() + 1)).sum().double() for x in outputs[:-2]]).sum().backward()
    for i, (dtype, x) in enumerate(zip(dtypes, inputs, strict=True)):
        is_used = i < len(dtypes) - 1
        if is_used or world_size > 1:
            assert x.grad is not None
            expected = torch.full((i + 2, 3), sum(range(1, world_size + 1)) if is_used else 0, dtype=dtype)
            assert_close(x.grad, expected, 0.0)
    assert all_reduce.call_count == (3 if world_size > 1 else 0)


@on_live_ranks(2)
def test_backward_of_copy_leaves_sibling_gradient_alone() -> None:
    """Catches an all-reduce in place: in ``copy(x) + z`` autograd hands one incoming gradient to both."""
    x, z = values(0, *SHAPE).requires_grad_(), values(1, *SHAPE).requires_grad_()
    sibling = z * 2.0  # before the copy, so that autograd comes to it after the copy
    gradient = values(2, *SHAPE)
    (copy_to_tensor_parallel_region(group(), x)[0] + sibling).backward(gradient)
    for found in (x.grad, z.grad, 2 * gradient):
        assert found is not None
        assert torch.equal(found, 2 * values(2, *SHAPE))


@on_live_ranks(2)
def test_gradient_of_a_parameter_does_not_keep_the_activations() -> None:
    """Catches a bias whose gradient is a view of the buffer that it shared with the activations' gradient."""
    activations, bias = values(0, 1000, 8).requires_grad_(), values(1, 8).requires_grad_()
    torch.add(*copy_to_tensor_parallel_region(group(), activations, bias)).sum().backward()
    assert bias.grad is not None
    assert bias.grad.untyped_storage().nbytes() == 8 * 8
