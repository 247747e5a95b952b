"""The two linear layers against plain products: output, and the gradient of the input, the weight and the bias."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_megatron.partition import FusedSplit, Replicated, Spec, Split
from hf_megatron.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    local,
    parallelize_module,
)
from tests.tensor_parallel.ranks import TP_SIZES, Pool, assert_close, mesh, same_on_all_ranks, values

B, S = 2, 3
IN, OUT, BLOCKS = 10, 14, 3  # over 4 ranks: 3, 3, 3, 1 and 4, 4, 4, 2


@dataclass(frozen=True)
class Case:
    """One linear layer, and how its tensors lie on the ranks."""

    kind: Literal["column", "row", "fused"]
    layout: Literal["out_in", "in_out"]
    has_bias: bool

    @property
    def out_features(self) -> int:
        return BLOCKS * IN if self.kind == "fused" else OUT

    @property
    def out_dim(self) -> int:
        """The weight's dimension that belongs to the output."""
        return 1 if self.layout == "in_out" else 0

    @property
    def specs(self) -> dict[str, Spec]:
        """How input, output, weight and bias are cut, independently of what the layer says."""
        whole, cut, fused = Replicated(), Split(2), FusedSplit(2, BLOCKS)
        of_kinds: dict[str, tuple[Spec, ...]] = {
            "column": (whole, cut, Split(self.out_dim), Split(0)),
            "row": (cut, whole, Split(1 - self.out_dim), whole),
            "fused": (whole, fused, FusedSplit(self.out_dim, BLOCKS), whole),
        }
        return dict(zip(("input", "output", "weight", "bias"), of_kinds[self.kind], strict=True))

    def full_weight(self) -> torch.Tensor:
        weight = values(1, self.out_features, IN)
        return weight.t().contiguous() if self.layout == "in_out" else weight

    def layer(self) -> ColumnParallelLinear | RowParallelLinear:
        """The layer with full parameters."""
        layer_class = RowParallelLinear if self.kind == "row" else ColumnParallelLinear
        specs = None
        if self.kind == "fused":
            specs = {"weight": self.specs["weight"], "bias": Replicated(used=FusedSplit(0, BLOCKS))}
        layer = layer_class(IN, self.out_features, bias=self.has_bias, weight_layout=self.layout, specs=specs).double()
        with torch.no_grad():
            layer.weight.copy_(self.full_weight())
            if layer.bias is not None:
                layer.bias.copy_(values(2, self.out_features))
        return layer


CASES = [
    Case(kind, layout, has_bias)
    for kind in ("column", "row", "fused")
    for layout in ("out_in", "in_out")
    for has_bias in (True, False)
]


def _gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    gradient = parameter.grad
    assert isinstance(parameter, DTensor)
    assert isinstance(gradient, DTensor)
    assert gradient.placements == parameter.placements  # not partial: optimizers would reduce it again and again
    return gradient.to_local()


def _run(case: Case, has_frozen_input: bool) -> dict[str, torch.Tensor]:
    layer = parallelize_module(case.layer(), mesh())
    assert isinstance(layer, ColumnParallelLinear | RowParallelLinear)
    size, rank = layer.tp_group.size, layer.tp_group.rank
    x = case.specs["input"].shard(values(0, B, S, IN), size, rank).clone().requires_grad_(not has_frozen_input)
    output = layer(x)
    output.backward(case.specs["output"].shard(values(3, B, S, case.out_features), size, rank))
    results = {"output": output.detach(), "weight": _gradient_of(layer.weight)}
    if x.grad is not None:
        results["input"] = x.grad
    if layer.bias is not None:
        results["bias"] = _gradient_of(layer.bias)
    return results


def _reference(case: Case, has_frozen_input: bool) -> dict[str, torch.Tensor]:
    x = values(0, B, S, IN).requires_grad_()
    weight = case.full_weight().requires_grad_()
    bias = values(2, case.out_features).requires_grad_()
    product = x @ (weight if case.layout == "in_out" else weight.t())
    output = product + bias if case.has_bias else product
    output.backward(values(3, B, S, case.out_features))
    results = {"output": output.detach(), "weight": weight.grad, "input": x.grad, "bias": bias.grad}
    if has_frozen_input:
        del results["input"]
    return {name: value for name, value in results.items() if value is not None}


def _whole(spec: Spec, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return same_on_all_ranks(parts) if isinstance(spec, Replicated) else spec.merge(parts)


@pytest.mark.parametrize("has_frozen_input", [False, True], ids=["", "frozen_input"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_linear_layers_equal_plain_products(pool: Pool, tp_size: int, case: Case, has_frozen_input: bool) -> None:
    """Catches a cut along the wrong dimension, mixed-up Q, K and V, a bias that is added once per rank, gradients of
    replicated tensors that stay partial sums or differ between ranks, and one that depends on the input having one."""
    results = pool(tp_size).run(_run, case, has_frozen_input)
    expected = _reference(case, has_frozen_input)
    assert results[0].keys() == expected.keys()
    for name, value in expected.items():
        assert_close(_whole(case.specs[name], [result[name] for result in results]), value)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("shape", [(IN,), (4, IN), (0, IN), (2, 1, 3, IN)])
def test_any_leading_dimensions(layout: Literal["out_in", "in_out"], shape: tuple[int, ...]) -> None:
    """Catches a product that only takes [B, S, H]."""
    layer = ColumnParallelLinear(IN, OUT, weight_layout=layout)
    weight = local(layer.weight)
    expected = torch.zeros(shape) @ (weight if layout == "in_out" else weight.t())
    assert layer(torch.zeros(shape)).shape == expected.shape
