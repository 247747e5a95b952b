"""The two linear layers against plain products: output, and the gradient of the input, the weight and the bias."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from hf_megatron.partition import FusedSplit, Replicated, Spec, Split
from hf_megatron.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel_linear,
    local,
    parallelize_module,
)
from tests.tensor_parallel.ranks import TP_SIZES, Pool, assert_close, mesh, same_on_all_ranks

B, S = 2, 3
IN, OUT, BLOCKS = 10, 14, 3  # over 4 ranks: 3, 3, 3, 1 and 4, 4, 4, 2


def _values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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
        match self.kind:
            case "column":
                cut: Spec = Split(2)
                return {"input": Replicated(), "output": cut, "weight": Split(self.out_dim), "bias": Split(0)}
            case "row":
                cut = Split(2)
                return {"input": cut, "output": Replicated(), "weight": Split(1 - self.out_dim), "bias": Replicated()}
        fused = FusedSplit(self.out_dim, BLOCKS)
        return {"input": Replicated(), "output": FusedSplit(2, BLOCKS), "weight": fused, "bias": Replicated()}

    def full_weight(self) -> torch.Tensor:
        weight = _values(1, self.out_features, IN)
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
                layer.bias.copy_(_values(2, self.out_features))
        return layer


CASES = [
    Case(kind, layout, has_bias)
    for kind in ("column", "row", "fused")
    for layout in ("out_in", "in_out")
    for has_bias in (True, False)
]


def _case_name(case: Case) -> str:
    return f"{case.kind}-{case.layout}-{'bias' if case.has_bias else 'no_bias'}"


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
    x = case.specs["input"].shard(_values(0, B, S, IN), size, rank).clone().requires_grad_(not has_frozen_input)
    output = layer(x)
    output.backward(case.specs["output"].shard(_values(3, B, S, case.out_features), size, rank))
    results = {"output": output.detach(), "weight": _gradient_of(layer.weight)}
    if x.grad is not None:
        results["input"] = x.grad
    if layer.bias is not None:
        results["bias"] = _gradient_of(layer.bias)
    return results


def _reference(case: Case, has_frozen_input: bool) -> dict[str, torch.Tensor]:
    x = _values(0, B, S, IN).requires_grad_()
    weight = case.full_weight().requires_grad_()
    bias = _values(2, case.out_features).requires_grad_()
    product = x @ (weight if case.layout == "in_out" else weight.t())
    output = product + bias if case.has_bias else product
    output.backward(_values(3, B, S, case.out_features))
    results = {"output": output.detach(), "weight": weight.grad, "input": x.grad, "bias": bias.grad}
    if has_frozen_input:
        del results["input"]
    return {name: value for name, value in results.items() if value is not None}


def _whole(spec: Spec, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return same_on_all_ranks(parts) if isinstance(spec, Replicated) else spec.merge(parts)


@pytest.mark.parametrize("has_frozen_input", [False, True], ids=["", "frozen_input"])
@pytest.mark.parametrize("case", CASES, ids=_case_name)
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_linear_layers_equal_plain_products(pool: Pool, tp_size: int, case: Case, has_frozen_input: bool) -> None:
    """Catches a cut along the wrong dimension, mixed-up Q, K and V, a bias that is added once per rank, gradients of
    replicated tensors that stay partial sums or differ between ranks, and one that depends on the input having one."""
    results = pool(tp_size).run(_run, case, has_frozen_input)
    expected = _reference(case, has_frozen_input)
    assert results[0].keys() == expected.keys()
    for name, value in expected.items():
        assert_close(_whole(case.specs[name], [result[name] for result in results]), value)


class Mlp(nn.Module):
    """H to 4H by columns and back by rows, as a transformer uses the two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(6, 24, weight_layout="in_out")
        self.down = RowParallelLinear(24, 6, weight_layout="in_out")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down(F.gelu(self.up(x)))
        return output


def _run_mlp(*, is_parallel: bool = True) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    mlp = Mlp().double()
    with torch.no_grad():
        for i, parameter in enumerate(mlp.parameters()):
            parameter.copy_(_values(i, *parameter.shape))
    if is_parallel:
        parallelize_module(mlp, mesh())
    x = _values(9, B, S, 6).requires_grad_()
    output = mlp(x) + x  # a residual, whose gradient meets that of the parallel region
    output.backward(_values(10, B, S, 6))
    assert x.grad is not None
    gradients = {name: parameter.grad for name, parameter in mlp.named_parameters() if parameter.grad is not None}
    full = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return output.detach(), x.grad, full


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_columns_then_rows_need_nothing_in_between(pool: Pool, tp_size: int) -> None:
    """Catches layers that are right one by one and do not fit together, and a residual counted once per rank."""
    expected_output, expected_gradient, expected_gradients = _run_mlp(is_parallel=False)
    for output, gradient, gradients in pool(tp_size).run(_run_mlp):
        assert_close(output, expected_output)
        assert_close(gradient, expected_gradient)
        assert gradients.keys() == expected_gradients.keys()
        for name, value in expected_gradients.items():
            assert_close(gradients[name], value)


def _run_three() -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of three layers on one input."""
    layers = [ColumnParallelLinear(IN, OUT).double() for _ in range(3)]
    for i, layer in enumerate(layers):
        with torch.no_grad():
            layer.weight.copy_(_values(i, OUT, IN))
        parallelize_module(layer, mesh())
    x = _values(9, B, S, IN).requires_grad_()
    products = column_parallel_linear(x, None, *layers)
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        sum((product.pow(2).sum() for product in products), start=x.new_zeros(())).backward()
    named = {f"{name} {i}": parameter for i, layer in enumerate(layers) for name, parameter in layer.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
    full = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    assert x.grad is not None
    return {"input": x.grad, **full}, all_reduce.call_count


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_layers_that_share_their_input_share_its_all_reduce(pool: Pool, tp_size: int) -> None:
    """Catches an input gradient that is summed once per layer: three times the communication, and a wrong sum; and
    gradients of one layer's weight or bias that are another's."""
    x = _values(9, B, S, IN).requires_grad_()
    parameters = {f"weight {i}": _values(i, OUT, IN).requires_grad_() for i in range(3)}
    parameters |= {f"bias {i}": torch.zeros(OUT, dtype=torch.float64).requires_grad_() for i in range(3)}
    torch.stack(
        [F.linear(x, parameters[f"weight {i}"], parameters[f"bias {i}"]).pow(2).sum() for i in range(3)]
    ).sum().backward()
    expected = {name: tensor.grad for name, tensor in {"input": x, **parameters}.items() if tensor.grad is not None}
    for gradients, num_all_reduces in pool(tp_size).run(_run_three):
        assert gradients.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(gradients[name], value)
        assert num_all_reduces == (1 if tp_size > 1 else 0)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("shape", [(IN,), (4, IN), (0, IN), (2, 1, 3, IN)])
def test_any_leading_dimensions(layout: Literal["out_in", "in_out"], shape: tuple[int, ...]) -> None:
    """Catches a product that only takes [B, S, H]."""
    layer = ColumnParallelLinear(IN, OUT, weight_layout=layout)
    weight = local(layer.weight)
    expected = torch.zeros(shape) @ (weight if layout == "in_out" else weight.t())
    assert layer(torch.zeros(shape)).shape == expected.shape


def test_layers_of_their_own_start_small() -> None:
    """Catches memory that is left as it was found, and a bias that is not zero."""
    torch.manual_seed(0)
    layer = RowParallelLinear(100, 200)
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.bias is not None
    assert not layer.bias.any()


def _descriptions() -> list[str]:
    layers = [ColumnParallelLinear(4, 8), RowParallelLinear(8, 4, bias=False)]
    return [repr(parallelize_module(layer, mesh())) for layer in layers]


def test_the_representation_tells_the_place_in_the_group(pool: Pool) -> None:
    """Catches a printed model in which nobody sees that it is cut, or with sizes that are not the full ones."""
    for rank, (column, row) in enumerate(pool(2).run(_descriptions)):
        place = f"tp_size=2, tp_rank={rank}"
        assert column == f"ColumnParallelLinear(in_features=4, out_features=8, bias=True, {place})"
        assert row == f"RowParallelLinear(in_features=8, out_features=4, bias=False, {place})"
    assert repr(ColumnParallelLinear(4, 8)) == "ColumnParallelLinear(in_features=4, out_features=8, bias=True)"
