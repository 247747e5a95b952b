"""Dropout that is the same at every degree, and one random stream that stays in step on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from hf_megatron.tensor_parallel import (
    SINGLE,
    attention_dropout,
    broadcast_from_first_rank,
    scatter_to_tensor_parallel_region,
    synchronize_random_state,
)
from hf_megatron.tensor_parallel.random import _attention_keep_mask, sliced_dropout
from tests.tensor_parallel.ranks import TP_SIZES, Pool, group, proven, same_on_all_ranks

Dropout = Callable[[torch.Tensor, float, int], torch.Tensor]

SHAPE = (2, 4, 16, 16)  # batch, heads, queries, keys
CPU = torch.device("cpu")


def _drop_twice(dropout: Dropout, p: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's heads of two calls in a row, and the state in which they leave the default generator."""
    torch.manual_seed(11)
    tp = group()
    ones = scatter_to_tensor_parallel_region(tp, torch.ones(SHAPE), dim=1)
    first_head = tp.rank * ones.shape[1]
    return dropout(ones, p, first_head), dropout(ones, p, first_head), torch.get_rng_state()


def _shared_stream(probabilities: torch.Tensor, p: float, first_head: int) -> torch.Tensor:
    """The defect: the default generator draws the mask, so that the heads of all ranks share it."""
    return torch.dropout(probabilities, p, train=True)


def _rank_seed(probabilities: torch.Tensor, p: float, first_head: int) -> torch.Tensor:
    """The defect: one generator for all of a rank's heads."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) + first_head)
    keep = torch.rand(probabilities.shape, generator=generator) >= p
    return probabilities * keep / (1 - p)


@pytest.mark.parametrize(
    ("dropout", "is_defective"), [(attention_dropout, False), (_shared_stream, True), (_rank_seed, True)]
)
def test_masks_do_not_depend_on_the_degree(pool: Pool, dropout: Dropout, is_defective: bool) -> None:
    """Catches masks by rank: a run at another degree, or resumed at one, would train on other masks."""
    with proven(is_defective):
        (whole, next_whole, state), *_ = pool(1).run(_drop_twice, dropout, 0.4)
        for tp_size in (2, 4):
            results = pool(tp_size).run(_drop_twice, dropout, 0.4)
            assert torch.equal(torch.cat([first for first, _, _ in results], dim=1), whole)
            assert torch.equal(torch.cat([second for _, second, _ in results], dim=1), next_whole)
            assert torch.equal(same_on_all_ranks([state for _, _, state in results]), state)


@pytest.mark.parametrize(("dropout", "is_defective"), [(attention_dropout, False), (_shared_stream, True)])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_every_mask_is_another_one(pool: Pool, tp_size: int, dropout: Dropout, is_defective: bool) -> None:
    """Catches heads of several ranks that drop the same positions, and masks shared by batch rows or calls."""
    with proven(is_defective):
        results = pool(tp_size).run(_drop_twice, dropout, 0.4)
        dropped = torch.cat([torch.cat([first, second], dim=1) for first, second, _ in results], dim=1)
        masks = {tuple(mask.flatten().tolist()) for mask in dropped.flatten(0, 1)}
        assert len(masks) == dropped.shape[0] * dropped.shape[1]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale_of_what_is_kept(p: float) -> None:
    """Catches p taken for the probability of keeping, a missing scale, and masks that are not random."""
    torch.manual_seed(0)
    dropped = attention_dropout(torch.ones(4, 8, 64, 64, dtype=torch.float64), p, 0)
    kept = dropped != 0
    for share in (kept.double().mean(), *kept.double().mean(dim=(0, 2, 3)), *kept.double().mean(dim=(1, 2, 3))):
        # Five standard deviations of a share over the smallest of these sets, 4 x 64 x 64 elements.
        assert share.item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / (4 * 64 * 64)) ** 0.5)
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - p)))


def test_gradient_passes_where_elements_were_kept() -> None:
    """Catches a gradient through another mask, or without the scale."""
    probabilities = torch.rand(SHAPE, dtype=torch.float64).add_(0.1).requires_grad_()
    dropped = attention_dropout(probabilities, 0.25, 2)
    dropped.sum().backward()
    assert probabilities.grad is not None
    torch.testing.assert_close(probabilities.grad, (dropped != 0) / 0.75, check_dtype=False)


def test_nothing_and_everything_dropped() -> None:
    """Catches a division by zero, and random numbers that are drawn for nothing."""
    probabilities = torch.rand(SHAPE)
    before = torch.get_rng_state()
    assert attention_dropout(probabilities, 0.0, 0) is probabilities
    assert torch.equal(attention_dropout(probabilities, 1.0, 0), torch.zeros(SHAPE))
    assert torch.equal(torch.get_rng_state(), before)


class _OwnStream:
    """The defect: a generator that lives as long as the model, which checkpointing does not wind back."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, probabilities: torch.Tensor, p: float, first_head: int) -> torch.Tensor:
        return probabilities * (torch.rand(probabilities.shape, generator=self.generator) >= p) / (1 - p)


@pytest.mark.parametrize(("make_dropout", "is_defective"), [(lambda: attention_dropout, False), (_OwnStream, True)])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(
    make_dropout: Callable[[], Dropout], is_defective: bool, use_reentrant: bool
) -> None:
    """Catches a recomputation with other masks, which makes the gradients those of another function."""

    def gradient(is_checkpointed: bool) -> torch.Tensor:
        torch.manual_seed(3)
        dropout = make_dropout()
        scores = torch.linspace(-2, 2, 1024, dtype=torch.float64).reshape(1, 4, 16, 16).requires_grad_()

        def forward(x: torch.Tensor) -> torch.Tensor:
            return dropout(torch.softmax(x, dim=-1), 0.4, 0).pow(2)

        output = checkpoint(forward, scores, use_reentrant=use_reentrant) if is_checkpointed else forward(scores)
        assert isinstance(output, torch.Tensor)
        output.sum().backward()
        assert scores.grad is not None
        return scores.grad

    with proven(is_defective):
        assert torch.equal(gradient(is_checkpointed=True), gradient(is_checkpointed=False))


def test_the_keep_mask_is_a_well_formed_operator() -> None:
    """Catches what torch.compile would trip over: a wrong shape or dtype of the fake mask, or a hidden mutation."""
    arguments = (torch.rand(SHAPE), torch.tensor(5), 0.3, 2)
    torch.library.opcheck(_attention_keep_mask, arguments)


def _synchronize(seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seeds[dist.get_rank()])
    torch.rand(5)
    before = torch.get_rng_state()
    synchronize_random_state(group(), CPU)
    return before, torch.get_rng_state()


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_random_states_become_those_of_the_first_rank(pool: Pool, tp_size: int) -> None:
    """Catches ranks seeded differently that sample different tokens, and a first rank whose stream is disturbed."""
    results = pool(tp_size).run(_synchronize, [5, 6, 7, 8])
    assert torch.equal(same_on_all_ranks([after for _, after in results]), results[0][0])
    assert len({tuple(before.tolist()) for before, _ in results}) == tp_size


def _broadcast() -> tuple[torch.Tensor, torch.Tensor]:
    mine = torch.tensor([dist.get_rank() + 3])
    return broadcast_from_first_rank(group(), mine, CPU), mine


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_broadcast_leaves_its_argument_alone(pool: Pool, tp_size: int) -> None:
    """Catches a rank's own value that is overwritten by the first rank's."""
    for rank, (value, mine) in enumerate(pool(tp_size).run(_broadcast)):
        assert value.tolist() == [3]
        assert mine.tolist() == [rank + 3]


def test_one_rank_is_in_step_with_itself() -> None:
    """Catches a collective, which needs a process group, in a plain process."""
    before = torch.get_rng_state()
    synchronize_random_state(SINGLE, CPU)
    assert torch.equal(torch.get_rng_state(), before)


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
