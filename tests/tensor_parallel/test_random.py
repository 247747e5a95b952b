"""Dropout that is the same at every degree, and one random stream that stays in step on all ranks."""

import pytest
import torch
import torch.distributed as dist

from hf_megatron.tensor_parallel import (
    SINGLE,
    attention_dropout,
    broadcast_from_first_rank,
    scatter_to_tensor_parallel_region,
    synchronize_random_state,
)
from hf_megatron.tensor_parallel.random import _attention_keep_mask, sliced_dropout
from tests.live import on_live_ranks
from tests.tensor_parallel.ranks import TP_SIZES, group

SHAPE = (2, 4, 16, 16)  # batch, heads, queries, keys
CPU = torch.device("cpu")


@pytest.mark.parametrize("world_size", [2, 4])
@on_live_ranks()
def test_masks_do_not_depend_on_the_degree(world_size: int) -> None:
    """Catches masks by rank, which another degree does not repeat, and heads, rows or calls masked alike."""
    results = []
    for tp in (SINGLE, group()):
        torch.manual_seed(11)
        ones = scatter_to_tensor_parallel_region(tp, torch.ones(SHAPE), dim=1)
        twice = [attention_dropout(ones, 0.4, tp.rank * ones.shape[1]) for _ in range(2)]
        results.append((torch.stack(twice), torch.get_rng_state()))
    (whole, state), (mine, my_state) = results
    assert torch.equal(mine, scatter_to_tensor_parallel_region(group(), whole, dim=2))
    assert torch.equal(my_state, state)
    assert len({tuple(mask.flatten().tolist()) for mask in whole.flatten(0, 2)}) == 2 * 2 * 4


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale_of_what_is_kept(p: float) -> None:
    """Catches p taken for what is kept, a missing scale, masks that are not random, and another mask backward."""
    torch.manual_seed(0)
    probabilities = torch.ones(4, 8, 64, 64, dtype=torch.float64, requires_grad=True)
    dropped = attention_dropout(probabilities, p, 0)
    kept = (dropped != 0).double()
    for share in (kept.mean(), *kept.mean(dim=(0, 2, 3)), *kept.mean(dim=(1, 2, 3))):
        # Five standard deviations of a share over the smallest of these sets, 4 x 64 x 64 elements.
        assert share.item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / (4 * 64 * 64)) ** 0.5)
    torch.testing.assert_close(dropped.detach(), kept / (1 - p))
    (3 * dropped).sum().backward()
    torch.testing.assert_close(probabilities.grad, 3 * kept / (1 - p))


def test_nothing_and_everything_dropped() -> None:
    """Catches a division by zero, and random numbers that are drawn for nothing."""
    probabilities = torch.rand(SHAPE)
    before = torch.get_rng_state()
    assert attention_dropout(probabilities, 0.0, 0) is probabilities
    assert torch.equal(attention_dropout(probabilities, 1.0, 0), torch.zeros(SHAPE))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_keep_mask_is_a_well_formed_operator() -> None:
    """Catches what torch.compile would trip over: a wrong shape or dtype of the fake mask, or a hidden mutation."""
    arguments = (torch.rand(SHAPE), torch.tensor(5), 0.3, 2)
    torch.library.opcheck(_attention_keep_mask, arguments)


@pytest.mark.parametrize("world_size", TP_SIZES)
@on_live_ranks()
def test_ranks_follow_the_first(world_size: int) -> None:
    """Catches ranks that sample different tokens, a first rank that is disturbed, and a value overwritten."""
    rank = dist.get_rank()
    torch.manual_seed(5 + rank)
    synchronize_random_state(group(), CPU)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(5).get_state())
    mine = torch.tensor([rank + 3])
    assert broadcast_from_first_rank(group(), mine, CPU).item() == 3
    assert mine.item() == rank + 3


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize(("world_size", "size"), [(1, 5), (2, 5), (4, 8), (4, 5)])  # 5 over 4 are 2, 2, 1 and none
@on_live_ranks()
def test_slices_are_dropped_as_the_whole_is(world_size: int, size: int, p: float) -> None:
    """Catches a mask drawn for the slice, which is another one and leaves the ranks' streams at different places."""
    tp, whole = group(), torch.randn(3, size, 7, generator=torch.Generator().manual_seed(1))
    results: list[tuple[torch.Tensor, ...]] = []
    for given in (whole, scatter_to_tensor_parallel_region(tp, whole, dim=1)):
        x = given.clone().requires_grad_()
        torch.manual_seed(12)
        dropped = torch.nn.functional.dropout(x, p) if not results else sliced_dropout(tp, x, p, dim=-2, size=size)
        dropped.sum().backward()
        assert x.grad is not None
        results.append((dropped.detach(), x.grad, torch.get_rng_state()))
    (*expected, state), (*mine, my_state) = results
    assert torch.equal(my_state, state)
    for tensor, value in zip(mine, expected, strict=True):
        torch.testing.assert_close(tensor, scatter_to_tensor_parallel_region(tp, value, dim=1))
