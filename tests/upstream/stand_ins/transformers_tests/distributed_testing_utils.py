"""Stands in for a module that the source distribution leaves out: how the tests of tensor parallelism start ranks."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch.distributed as dist

from tests.distributed import RankPool


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., Any]]:
    """A decorator: the function, called with each rank's number first, runs on that many ranks."""

    def on_ranks(function: Callable[..., None]) -> Callable[..., Any]:
        return lambda *args: _pool(world_size).run(_call_with_rank, function, args, timeout=120.0)

    return on_ranks


def _call_with_rank(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    function(dist.get_rank(), *args)


@cache
def _pool(world_size: int) -> RankPool:
    return RankPool(world_size)
