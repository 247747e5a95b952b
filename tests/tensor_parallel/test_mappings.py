"""The region functions: what they do forward and backward, and that they leave alone what they were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hf_megatron.partition import Split
from hf_megatron.tensor_parallel import (
    SINGLE,
    ColumnParallelLinear,
    SequenceParallelRegion,
    TensorParallelGroup,
    column_parallel_linear,
    copy_to_tensor_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_parallel_region,
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_parallel_region,
)
from hf_megatron.tensor_parallel.collectives import start_all_gather
from tests.tensor_parallel.ranks import TP_SIZES, Pool, assert_close, group, proven, same_on_all_ranks

Copy = Callable[..., tuple[torch.Tensor, ...]]
Reduce = Callable[[TensorParallelGroup, torch.Tensor], torch.Tensor]

SHAPE = (5, 6, 7)  # over 4 ranks: 2, 2, 1, 0; 2, 2, 2, 0; 2, 2, 2, 1


def _values(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- copy


def _copy_several(dtypes: list[torch.dtype]) -> tuple[list[torch.Tensor], list[torch.Tensor | None], int]:
    """Copy a tensor of each dtype and a frozen one; compute with all but the last dtype's, differently on each rank."""
    inputs = [_values(i, (i + 2, 3), dtype).requires_grad_() for i, dtype in enumerate(dtypes)]
    frozen = _values(50, (2, 3), torch.float16)  # the only one of this dtype: needs no collective
    outputs = copy_to_tensor_parallel_region(group(), *inputs, frozen)
    assert torch.equal(outputs[-1], frozen)
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        loss = sum((x * (dist.get_rank() + 1)).sum().double() for x in outputs[:-2])
        assert isinstance(loss, torch.Tensor)
        loss.backward()
    return [x.detach() for x in outputs[:-1]], [x.grad for x in inputs], all_reduce.call_count


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_copy_sums_the_gradients(pool: Pool, tp_size: int) -> None:
    """Catches gradients that stay partial sums, get mixed up between tensors or lose their dtype, and a collective
    for each tensor where one for each dtype does."""
    dtypes = [torch.float64, torch.float32, torch.float64, torch.bfloat16, torch.float32]
    results = pool(tp_size).run(_copy_several, dtypes)
    total = sum(range(1, tp_size + 1))
    for i, dtype in enumerate(dtypes):
        copied = same_on_all_ranks([outputs[i] for outputs, _, _ in results])
        assert torch.equal(copied, _values(i, (i + 2, 3), dtype))
        gradients = [gradients[i] for _, gradients, _ in results]
        if i == len(dtypes) - 1 and tp_size == 1:
            assert gradients == [None]  # not used
            continue
        expected = torch.full_like(copied, 0 if i == len(dtypes) - 1 else total)
        for gradient in gradients:
            assert gradient is not None
            assert torch.equal(gradient, expected)
            assert gradient.dtype == dtype
    assert {calls for _, _, calls in results} == {3 if tp_size > 1 else 0}


class _CopyThatReducesInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(gradient)
        return gradient


def _copy_that_reduces_in_place(group: TensorParallelGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(_CopyThatReducesInPlace.apply(x) for x in tensors)


def _add_to_copy(copy: Copy) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, z = _values(0).requires_grad_(), _values(1).requires_grad_()
    sibling = z * 2.0  # before the copy, so that autograd comes to it after the copy
    y = copy(group(), x)[0] + sibling
    gradient = _values(2)
    y.backward(gradient)
    assert x.grad is not None
    assert z.grad is not None
    return x.grad, z.grad, gradient


@pytest.mark.parametrize(
    ("copy", "is_defective"), [(copy_to_tensor_parallel_region, False), (_copy_that_reduces_in_place, True)]
)
def test_backward_of_copy_leaves_sibling_gradient_alone(pool: Pool, copy: Copy, is_defective: bool) -> None:
    """Catches an all-reduce in place on the incoming gradient: in ``copy(x) + z`` autograd hands one tensor to both,
    so z's gradient would be multiplied by the number of ranks."""
    with proven(is_defective):
        for of_x, of_z, gradient in pool(2).run(_add_to_copy, copy):
            assert torch.equal(of_x, 2 * _values(2))
            assert torch.equal(of_z, 2 * _values(2))
            assert torch.equal(gradient, _values(2))


def _flat_views(group: TensorParallelGroup, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    flat = torch.cat([x.reshape(-1) for x in tensors])
    dist.all_reduce(flat)
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def _bytes_behind_small_gradient(returns_views: bool) -> int:
    activations, bias = _values(0, (1000, 8)).requires_grad_(), _values(1, (8,)).requires_grad_()
    module = "hf_megatron.tensor_parallel.mappings"
    copies = copy_to_tensor_parallel_region(group(), activations, bias)
    if returns_views:
        with patch(f"{module}._all_reduced_together", _flat_views):
            torch.add(*copies).sum().backward()
    else:
        torch.add(*copies).sum().backward()
    assert bias.grad is not None
    return bias.grad.untyped_storage().nbytes()


@pytest.mark.parametrize("is_defective", [False, True])
def test_gradient_of_a_parameter_does_not_keep_the_activations(pool: Pool, is_defective: bool) -> None:
    """Catches a bias whose gradient is a view of the buffer it shared with the activations' gradient: until
    ``zero_grad`` every layer would hold one more tensor of the activations' size."""
    with proven(is_defective):
        assert pool(2).run(_bytes_behind_small_gradient, is_defective) == [8 * 8] * 2


# -------------------------------------------------------------------- reduce


def _reduce(reduce: Reduce) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    source = _values(dist.get_rank()).requires_grad_()
    partial_sum = source.transpose(0, 2) * 1.0
    before = partial_sum.detach().clone()
    total = reduce(group(), partial_sum)
    (total * _values(10).transpose(0, 2)).sum().backward()
    assert source.grad is not None
    return total.detach(), source.grad, before, partial_sum.detach()


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_reduce_sums_forward_and_passes_the_gradient_on(pool: Pool, tp_size: int) -> None:
    """Catches a sum that is missing, and a gradient that is summed once more though it is whole already."""
    results = pool(tp_size).run(_reduce, reduce_from_tensor_parallel_region)
    expected = sum((_values(rank).transpose(0, 2) for rank in range(tp_size)), torch.zeros(()))
    assert_close(same_on_all_ranks([total for total, *_ in results]), expected)
    for _, gradient, _, _ in results:
        assert torch.equal(gradient, _values(10))


def _reduce_in_place(group: TensorParallelGroup, partial_sum: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(partial_sum.detach())
    return partial_sum


@pytest.mark.parametrize(
    ("reduce", "is_defective"), [(reduce_from_tensor_parallel_region, False), (_reduce_in_place, True)]
)
def test_reduce_leaves_its_argument_alone(pool: Pool, reduce: Reduce, is_defective: bool) -> None:
    """Catches an all-reduce in place on the argument: whoever still needs the partial sum finds the total there."""
    with proven(is_defective):
        for _, _, before, after in pool(2).run(_reduce, reduce):
            assert torch.equal(after, before)


# --------------------------------------------------------- gather and scatter


def _gather(dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tp = group()
    shard = Split(dim % 3).shard(_values(0), tp.size, tp.rank).clone().requires_grad_()
    full = gather_from_tensor_parallel_region(tp, shard, dim=dim, size=SHAPE[dim])
    gradient = _values(1)
    full.backward(gradient)
    assert shard.grad is not None
    assert torch.equal(gradient, _values(1))
    return full.detach(), shard.grad, shard.detach()


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_gather_makes_whole_what_is_cut_unevenly(pool: Pool, tp_size: int, dim: int) -> None:
    """Catches padding left in the middle, a wrong order, empty shards, and a gradient that is not this rank's slice."""
    results = pool(tp_size).run(_gather, dim)
    assert torch.equal(same_on_all_ranks([full for full, *_ in results]), _values(0))
    cut = Split(dim % 3)
    for (_, gradient, shard), expected in zip(results, cut.split(_values(1), tp_size), strict=True):
        assert torch.equal(gradient, expected)
        assert shard.shape == expected.shape


def _scatter(dim: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    tp = group()
    full = _values(0).requires_grad_()
    shard = scatter_to_tensor_parallel_region(tp, full, dim=dim)
    shard.backward(Split(dim % 3).shard(_values(1), tp.size, tp.rank))
    assert full.grad is not None
    return shard.detach(), full.grad, shard.untyped_storage().nbytes()


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_scatter_keeps_this_ranks_slice(pool: Pool, tp_size: int, dim: int) -> None:
    """Catches another rank's slice, a gradient that is not gathered, and a slice that keeps the whole alive."""
    results = pool(tp_size).run(_scatter, dim)
    expected = Split(dim % 3).split(_values(0), tp_size)
    for (shard, _, num_bytes), slice_ in zip(results, expected, strict=True):
        assert torch.equal(shard, slice_)
        assert num_bytes == slice_.numel() * 8
    assert torch.equal(same_on_all_ranks([gradient for _, gradient, _ in results]), _values(1))


# ----------------------------------------------------- sequence parallelism


def _enter(dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tp = group()
    shard = Split(dim % 3).shard(_values(0), tp.size, tp.rank).clone().requires_grad_()
    full = gather_from_sequence_parallel_region(tp, shard, dim=dim, size=SHAPE[dim])
    gradient = _values(1 + tp.rank)
    full.backward(gradient)
    assert shard.grad is not None
    assert torch.equal(gradient, _values(1 + tp.rank))
    return full.detach(), shard.grad, shard.detach()


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_entering_sums_the_gradients_of_each_part(pool: Pool, tp_size: int, dim: int) -> None:
    """Catches a gradient that is this rank's slice of a partial sum, or another rank's slice of the sum."""
    results = pool(tp_size).run(_enter, dim)
    assert torch.equal(same_on_all_ranks([full for full, *_ in results]), _values(0))
    total = sum((_values(1 + rank) for rank in range(tp_size)), torch.zeros(()))
    for (_, gradient, _), expected in zip(results, Split(dim % 3).split(total, tp_size), strict=True):
        assert_close(gradient, expected)


def _leave(dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tp = group()
    source = _values(tp.rank).requires_grad_()
    partial_sum = source * 1.0
    shard = reduce_scatter_to_sequence_parallel_region(tp, partial_sum, dim=dim)
    shard.backward(Split(dim % 3).shard(_values(10), tp.size, tp.rank))
    assert source.grad is not None
    return shard.detach(), source.grad, partial_sum.detach()


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_leaving_keeps_this_ranks_part_of_the_sum(pool: Pool, tp_size: int, dim: int) -> None:
    """Catches parts filled up in the middle, a gradient that is not gathered, and an argument that is changed."""
    results = pool(tp_size).run(_leave, dim)
    total = sum((_values(rank) for rank in range(tp_size)), torch.zeros(()))
    for (shard, _, _), expected in zip(results, Split(dim % 3).split(total, tp_size), strict=True):
        assert_close(shard, expected)
        assert shard.shape == expected.shape
    assert torch.equal(same_on_all_ranks([gradient for _, gradient, _ in results]), _values(10))
    for rank, (_, _, after) in enumerate(results):
        assert torch.equal(after, _values(rank))


def _multiply(is_transposed: bool, is_fused: bool, is_frozen: bool = False) -> list[torch.Tensor | None]:
    """Two products of one split input, and the gradients of input and weights."""
    tp = group()
    shard = Split(1).shard(_values(0), tp.size, tp.rank).clone().requires_grad_()
    weights = [_values(5 + tp.rank + 10 * i, (7, 4 + i)).requires_grad_(not is_frozen) for i in range(2)]
    stored = [weight.t() if is_transposed else weight for weight in weights]
    if is_fused:
        layers = []
        for weight in stored:
            layer = ColumnParallelLinear(1, 1, bias=False, weight_layout="out_in" if is_transposed else "in_out")
            layer.set_tensor_parallel(tp)
            layer._parameters["weight"] = weight  # type: ignore[assignment]
            layers.append(layer)
        products = column_parallel_linear(shard, SequenceParallelRegion(tp, SHAPE[1]), *layers)
    else:
        full = gather_from_sequence_parallel_region(tp, shard, dim=1, size=SHAPE[1])
        products = tuple(full @ weight for weight in weights)
    with patch("hf_megatron.tensor_parallel.linear.start_all_gather", wraps=start_all_gather) as gather:
        torch.stack([(product**2).sum() for product in products]).sum().backward()
    again = 1 if is_fused and not is_frozen else 0
    assert gather.call_count == again, f"{gather.call_count} gathers in the backward pass"
    return [*(product.detach() for product in products), shard.grad, *(weight.grad for weight in weights)]


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_products_behind_a_gather(pool: Pool, tp_size: int, is_transposed: bool) -> None:
    """Catches gradients of the products mixed up, weights taken for transposed, and an input gathered for each one."""
    expected = pool(tp_size).run(_multiply, is_transposed, False)
    for actual, reference in zip(pool(tp_size).run(_multiply, is_transposed, True), expected, strict=True):
        for tensor, value in zip(actual, reference, strict=True):
            assert tensor is not None
            assert value is not None
            assert_close(tensor, value)


def test_products_with_frozen_weights(pool: Pool) -> None:
    """Catches a gather for gradients that nobody wants."""
    for actual, reference in zip(*(pool(2).run(_multiply, False, fused, True) for fused in (True, False)), strict=True):
        assert actual[3:] == reference[3:] == [None, None]
        assert actual[2] is not None
        assert reference[2] is not None
        assert_close(actual[2], reference[2])


def test_one_rank_communicates_nothing() -> None:
    """Catches copies and collectives, which need a process group, in a plain process."""
    x = _values(0)
    assert copy_to_tensor_parallel_region(SINGLE, x, x)[1] is x
    assert reduce_from_tensor_parallel_region(SINGLE, x) is x
    assert gather_from_tensor_parallel_region(SINGLE, x, dim=0, size=5) is x
    assert scatter_to_tensor_parallel_region(SINGLE, x, dim=0) is x
    assert gather_from_sequence_parallel_region(SINGLE, x, dim=0, size=5) is x
    assert reduce_scatter_to_sequence_parallel_region(SINGLE, x, dim=0) is x
