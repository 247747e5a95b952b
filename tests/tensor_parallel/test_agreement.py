"""What the ranks of a group ask of each other, beside the facts that training compares."""

import torch.distributed as dist

from hf_megatron.tensor_parallel.agreement import RankComparison
from tests.live import on_live_ranks


@on_live_ranks(2)
def test_every_rank_is_heard() -> None:
    """Catches wishes of which only one rank's counts: who asks for a checkpoint may be any of them."""
    assert dist.group.WORLD is not None
    assert RankComparison.on_cpu(dist.group.WORLD).agree("here", {}, 1 << dist.get_rank()) == 0b11
