"""Products whose communication travels while other products are computed; their values are tested with the layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from hf_megatron.tensor_parallel import ColumnParallelLinear, column_parallel_linear
from tests.tensor_parallel.ranks import Pool, group


class _Order(TorchDispatchMode):
    """The names of products and collectives, as they are issued."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "addmm_", "allreduce_"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _order(num_layers: int) -> tuple[list[str], list[bool]]:
    layers = [ColumnParallelLinear(4, 6) for _ in range(num_layers)]
    for layer in layers:
        layer.set_tensor_parallel(group())
    x = torch.ones(3, 4, requires_grad=True)
    output = torch.cat(column_parallel_linear(x, None, *layers))
    are_async = []
    original: Any = dist.all_reduce

    def all_reduce(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        are_async.append(async_op)
        return original(*args, async_op=async_op, **kwargs)

    dist.all_reduce = all_reduce
    try:
        with _Order() as order:
            output.sum().backward()
    finally:
        dist.all_reduce = original
    return order.names, are_async


def test_the_sum_travels_while_the_weights_gradients_are_computed(pool: Pool) -> None:
    """Catches a sum that is waited for before the next product, or begun after it, or for each layer."""
    for names, are_async in pool(2).run(_order, 1):
        assert names == ["addmm_", "allreduce_", "mm"]
        assert are_async == [True]
    for names, are_async in pool(2).run(_order, 3):
        assert names == ["addmm_", "addmm_", "addmm_", "allreduce_", "mm", "mm", "mm"]
        assert are_async == [True]
