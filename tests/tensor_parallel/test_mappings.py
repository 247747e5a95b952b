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
from tests.tensor_parallel.ranks import TP_SIZES, Pool, assert_close, group, same_on_all_ranks, values

SHAPE = (5, 6, 7)  # over 4 ranks: 2, 2, 1, 0; 2, 2, 2, 0; 2, 2, 2, 1


@dataclass(frozen=True)
class Region:
    """A function of a group, a tensor and a dimension, and what it means.

    Attributes:
        takes_part: Whether it takes a rank's part, or a whole tensor.
        gives_part: Whether it gives one.
        sums: The direction in which it adds up what the ranks have.
    """

    function: Callable[[TensorParallelGroup, torch.Tensor, int], torch.Tensor]
    takes_part: bool = False
    gives_part: bool = False
    sums: str = ""


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


def _cross(name: str, dim: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Output, gradient of the input, and the bytes behind the output."""
    tp, region = group(), REGIONS[name]

    def mine(seed: int, is_part: bool, is_partial_sum: bool) -> torch.Tensor:
        whole = values(seed + (tp.rank if is_partial_sum else 0), *SHAPE)
        return Split(dim % 3).shard(whole, tp.size, tp.rank).clone() if is_part else whole

    source = mine(0, region.takes_part, region.sums == "forward").requires_grad_()
    argument = source.mT.clone(memory_format=torch.contiguous_format).mT  # not contiguous
    output = region.function(tp, argument, dim)
    gradient = mine(10, region.gives_part, region.sums == "backward")
    output.backward(gradient)
    assert torch.equal(argument, source), "the argument has changed"
    assert torch.equal(gradient, mine(10, region.gives_part, region.sums == "backward")), "the gradient has changed"
    assert source.grad is not None
    return output.detach(), source.grad, output.untyped_storage().nbytes()


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_regions_sum_cut_and_join(pool: Pool, tp_size: int, name: str, dim: int) -> None:
    """Catches sums left out or doubled, parts of another rank, padding of uneven parts, work in place, and a slice that
    keeps the whole alive."""
    outputs, gradients, num_bytes = zip(*pool(tp_size).run(_cross, name, dim), strict=True)
    region = REGIONS[name]
    for found, seed, is_part, direction in (
        (outputs, 0, region.gives_part, "forward"),
        (gradients, 10, region.takes_part, "backward"),
    ):
        is_sum = region.sums == direction
        whole = torch.stack([values(seed + rank, *SHAPE) for rank in range(tp_size if is_sum else 1)]).sum(0)
        expected = Split(dim % 3).split(whole, tp_size) if is_part else [whole] * tp_size
        for actual, value in zip(found, expected, strict=True):
            assert_close(actual, value, 1e-12 if is_sum else 0.0)
        assert is_part or same_on_all_ranks(found) is found[0]
    assert name != "scatter" or list(num_bytes) == [8 * output.numel() for output in outputs]


def test_one_rank_communicates_nothing() -> None:
    """Catches copies and collectives, which need a process group, in a plain process."""
    x = values(0, *SHAPE)
    assert copy_to_tensor_parallel_region(SINGLE, x, x)[1] is x
    assert all(region.function(SINGLE, x, 0) is x for region in REGIONS.values())


# ---------------------------------------------------------------------- copy


def _copy_several(dtypes: list[torch.dtype]) -> tuple[list[torch.Tensor | None], int]:
    """Copy a tensor of each dtype and a frozen one; compute with all but the last dtype's, differently on each rank."""
    inputs = [values(i, i + 2, 3, dtype=dtype).requires_grad_() for i, dtype in enumerate(dtypes)]
    frozen = values(50, 2, 3, dtype=torch.float16)  # the only one of this dtype: needs no collective
    outputs = copy_to_tensor_parallel_region(group(), *inputs, frozen)
    assert all(torch.equal(output, x) for output, x in zip(outputs, [*inputs, frozen], strict=True))
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        torch.stack([(x * (dist.get_rank() + 1)).sum().double() for x in outputs[:-2]]).sum().backward()
    return [x.grad for x in inputs], all_reduce.call_count


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_copy_sums_the_gradients(pool: Pool, tp_size: int) -> None:
    """Catches gradients that stay partial sums, get mixed up between tensors or lose their dtype, and a collective
    for each tensor where one for each dtype does."""
    dtypes = [torch.float64, torch.float32, torch.float64, torch.bfloat16, torch.float32]
    for gradients, num_calls in pool(tp_size).run(_copy_several, dtypes):
        for i, (dtype, gradient) in enumerate(zip(dtypes, gradients, strict=True)):
            is_used = i < len(dtypes) - 1
            if is_used or tp_size > 1:
                assert gradient is not None
                expected = torch.full((i + 2, 3), sum(range(1, tp_size + 1)) if is_used else 0, dtype=dtype)
                assert_close(gradient, expected, 0.0)
        assert num_calls == (3 if tp_size > 1 else 0)


def _add_to_copy() -> tuple[torch.Tensor | None, ...]:
    x, z = values(0, *SHAPE).requires_grad_(), values(1, *SHAPE).requires_grad_()
    sibling = z * 2.0  # before the copy, so that autograd comes to it after the copy
    gradient = values(2, *SHAPE)
    (copy_to_tensor_parallel_region(group(), x)[0] + sibling).backward(gradient)
    return x.grad, z.grad, 2 * gradient


def test_backward_of_copy_leaves_sibling_gradient_alone(pool: Pool) -> None:
    """Catches an all-reduce in place on the incoming gradient: in ``copy(x) + z`` autograd hands one tensor to both,
    so z's gradient would be multiplied by the number of ranks."""
    for found in pool(2).run(_add_to_copy):
        assert all(gradient is not None and torch.equal(gradient, 2 * values(2, *SHAPE)) for gradient in found)


def _bytes_behind_small_gradient() -> int:
    activations, bias = values(0, 1000, 8).requires_grad_(), values(1, 8).requires_grad_()
    torch.add(*copy_to_tensor_parallel_region(group(), activations, bias)).sum().backward()
    assert bias.grad is not None
    return bias.grad.untyped_storage().nbytes()


def test_gradient_of_a_parameter_does_not_keep_the_activations(pool: Pool) -> None:
    """Catches a bias whose gradient is a view of the buffer it shared with the activations' gradient: until
    ``zero_grad`` every layer would hold one more tensor of the activations' size."""
    assert pool(2).run(_bytes_behind_small_gradient) == [8 * 8] * 2
