"""What the ranks of a group ask of each other, beside the facts that training compares."""

import torch.distributed as dist

from hf_megatron.tensor_parallel.agreement import RankComparison
from tests.tensor_parallel.ranks import Pool


def _wish() -> int:
    assert dist.group.WORLD is not None
    return RankComparison.on_cpu(dist.group.WORLD).agree("here", {}, 1 << dist.get_rank())


def test_every_rank_is_heard(pool: Pool) -> None:
    """Catches wishes of which only one rank's counts: who asks for a checkpoint may be any of them."""
    assert pool(2).run(_wish) == [0b11, 0b11]
