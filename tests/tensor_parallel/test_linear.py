"""The two linear layers against plain products: output, and the gradient of the input, the weight and the bias."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch.distributed.tensor import DTensor

from hf_megatron.partition import FusedSplit, Replicated, Spec, Split
from hf_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear, local, parallelize_module
from tests.live import on_live_ranks
from tests.models.reference import assert_same_on_all_ranks
from tests.tensor_parallel.ranks import TP_SIZES, assert_close, mesh, values

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


_KINDS: Any = ("column", "row", "fused")
_LAYOUTS: Any = ("out_in", "in_out")
CASES = [Case(*case) for case in itertools.product(_KINDS, _LAYOUTS, (True, False))]


@pytest.mark.parametrize("has_frozen_input", [False, True], ids=["", "frozen_input"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("world_size", TP_SIZES)
@on_live_ranks()
def test_linear_layers_equal_plain_products(world_size: int, case: Case, has_frozen_input: bool) -> None:
    """Catches a cut along the wrong dimension, mixed-up Q, K and V, a bias that is added once per rank, gradients of
    replicated tensors that stay partial sums or differ between ranks, and one that depends on the input having one."""
    whole = {"input": values(0, B, S, IN), "weight": case.full_weight(), "bias": values(2, case.out_features)}
    x, weight, bias = (tensor.requires_grad_() for tensor in whole.values())
    expected = x @ (weight if case.layout == "in_out" else weight.t()) + (bias if case.has_bias else 0)
    expected.backward(values(3, B, S, case.out_features))

    layer: Any = parallelize_module(case.layer(), mesh())

    def part(name: str, tensor: Any) -> torch.Tensor:
        return case.specs[name].shard(tensor.detach(), layer.tp_group.size, layer.tp_group.rank)

    shard = part("input", x).clone().requires_grad_(not has_frozen_input)
    output = layer(shard)
    output.backward(part("output", values(3, B, S, case.out_features)))
    assert_close(output.detach(), part("output", expected))
    for name, tensor in {"input": shard, **dict(layer.named_parameters())}.items():
        gradient = tensor.grad
        assert (gradient is None) == (name == "input" and has_frozen_input)
        if isinstance(tensor, DTensor):
            assert gradient.placements == tensor.placements  # not partial: optimizers would sum it again and again
            gradient = gradient.to_local()
        if gradient is not None:
            assert_close(gradient, part(name, whole[name].grad))
            if isinstance(case.specs[name], Replicated):
                assert_same_on_all_ranks(name, gradient)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("shape", [(IN,), (4, IN), (0, IN), (2, 1, 3, IN)])
def test_any_leading_dimensions(layout: Literal["out_in", "in_out"], shape: tuple[int, ...]) -> None:
    """Catches a product that only takes [B, S, H]."""
    layer = ColumnParallelLinear(IN, OUT, weight_layout=layout)
    weight = local(layer.weight)
    expected = torch.zeros(shape) @ (weight if layout == "in_out" else weight.t())
    assert layer(torch.zeros(shape)).shape == expected.shape
