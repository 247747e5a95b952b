"""Products whose communication travels while other products are computed; their values are tested with the models."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from hf_megatron.tensor_parallel import ColumnParallelLinear, column_parallel_linear
from tests.live import on_live_ranks
from tests.tensor_parallel.ranks import group


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


@pytest.mark.parametrize("num_layers", [1, 3])
@on_live_ranks(2)
def test_the_sum_travels_while_the_weights_gradients_are_computed(num_layers: int) -> None:
    """Catches a sum that is waited for before the next product, or begun after it, or for each layer."""
    layers = [ColumnParallelLinear(4, 6) for _ in range(num_layers)]
    for layer in layers:
        layer.set_tensor_parallel(group())
    output = torch.cat(column_parallel_linear(torch.ones(3, 4, requires_grad=True), None, *layers))
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce, _Order() as order:
        output.sum().backward()
    assert order.names == ["addmm_"] * num_layers + ["allreduce_"] + ["mm"] * num_layers, order.names
    assert [call.kwargs["async_op"] for call in all_reduce.call_args_list] == [True]
