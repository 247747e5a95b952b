"""Dropout that is the same at every degree, and one random stream that stays in step on all ranks."""

import pytest
import torch
import torch.distributed as dist

from hf_megatron.tensor_parallel import (
    attention_dropout,
    broadcast_from_first_rank,
    scatter_to_tensor_parallel_region,
    synchronize_random_state,
)
from hf_megatron.tensor_parallel.random import _attention_keep_mask, sliced_dropout
from tests.tensor_parallel.ranks import TP_SIZES, Pool, group, same_on_all_ranks

SHAPE = (2, 4, 16, 16)  # batch, heads, queries, keys
CPU = torch.device("cpu")


def _drop_twice(p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's heads of two calls in a row, and the state in which they leave the default generator."""
    torch.manual_seed(11)
    tp = group()
    ones = scatter_to_tensor_parallel_region(tp, torch.ones(SHAPE), dim=1)
    first_head = tp.rank * ones.shape[1]
    return torch.stack([attention_dropout(ones, p, first_head) for _ in range(2)]), torch.get_rng_state()


@pytest.mark.parametrize("tp_size", [2, 4])
def test_masks_do_not_depend_on_the_degree(pool: Pool, tp_size: int) -> None:
    """Catches masks by rank, which another degree does not repeat, and heads, rows or calls masked alike."""
    (whole, state), *_ = pool(1).run(_drop_twice, 0.4)
    dropped, states = zip(*pool(tp_size).run(_drop_twice, 0.4), strict=True)
    assert torch.equal(torch.cat(dropped, dim=2), whole)
    assert torch.equal(same_on_all_ranks(states), state)
    assert len({tuple(mask.flatten().tolist()) for mask in whole.flatten(0, 2)}) == 2 * 2 * 4


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale_of_what_is_kept(p: float) -> None:
    """Catches p taken for the probability of keeping, a missing scale, masks that are not random, and a gradient
    through another mask."""
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


def _follow_the_first_rank() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5 + dist.get_rank())
    before = torch.get_rng_state()
    synchronize_random_state(group(), CPU)
    mine = torch.tensor([dist.get_rank() + 3])
    return before, torch.get_rng_state(), broadcast_from_first_rank(group(), mine, CPU), mine


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_ranks_follow_the_first(pool: Pool, tp_size: int) -> None:
    """Catches ranks that sample different tokens, a first rank whose stream is disturbed, and a rank's own value that
    the first one's overwrites."""
    before, after, values, mine = zip(*pool(tp_size).run(_follow_the_first_rank), strict=True)
    assert torch.equal(same_on_all_ranks(after), before[0])
    assert len({tuple(state.tolist()) for state in before}) == tp_size
    assert [value.item() for value in values] == [3] * tp_size
    assert [value.item() for value in mine] == list(range(3, 3 + tp_size))


def _drop_slice(p: float, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's slice after dropout, its gradient, and the state in which the default generator is left."""
    torch.manual_seed(12)
    tp = group()
    whole = torch.randn(3, size, 7, generator=torch.Generator().manual_seed(1))
    part = scatter_to_tensor_parallel_region(tp, whole, dim=1).requires_grad_()
    dropped = sliced_dropout(tp, part, p, dim=-2, size=size)
    dropped.sum().backward()
    assert part.grad is not None
    return dropped.detach(), part.grad, torch.get_rng_state()


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize(("tp_size", "size"), [(1, 5), (2, 5), (4, 8), (4, 5)])  # 5 over 4 are 2, 2, 1 and none
def test_slices_are_dropped_as_the_whole_is(pool: Pool, tp_size: int, size: int, p: float) -> None:
    """Catches a mask drawn for the slice, which is another one and leaves the ranks' streams at different places."""
    torch.manual_seed(12)
    whole = torch.randn(3, size, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = torch.nn.functional.dropout(whole, p)
    expected.sum().backward()
    assert whole.grad is not None
    results = pool(tp_size).run(_drop_slice, p, size)
    torch.testing.assert_close(torch.cat([dropped for dropped, _, _ in results], dim=1), expected.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient, _ in results], dim=1), whole.grad)
    assert torch.equal(same_on_all_ranks([state for _, _, state in results]), torch.get_rng_state())
