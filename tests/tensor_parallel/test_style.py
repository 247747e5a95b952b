"""Cutting modules on their own, the group they get to know, and the plan for transformers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from hf_megatron.architectures import GPT2
from hf_megatron.models.parallel_style import STYLE_NAME, head_tp_plan_of, tp_plan_of
from hf_megatron.partition import FusedSplit, Replicated, Spec, Split, VocabSplit
from hf_megatron.tensor_parallel import (
    SINGLE,
    ColumnParallelLinear,
    ParallelModule,
    ReplicatedLayerNorm,
    RowParallelLinear,
    TensorParallelGroup,
    VocabParallelEmbedding,
    local,
    parallelize_module,
)
from hf_megatron.tensor_parallel.placement import placement_of
from tests.tensor_parallel.ranks import TP_SIZES, Pool, group, mesh

SPECS: dict[str, Spec] = {
    "embedding.weight": VocabSplit(),
    "block.norm.weight": Replicated(),
    "block.norm.bias": Replicated(),
    "block.qkv.weight": FusedSplit(1, num_blocks=3),
    "block.qkv.bias": Replicated(),
    "block.up.weight": Split(0),
    "block.up.bias": Split(0),
    "block.down.weight": Split(1),
}


class Model(nn.Module):
    """One of each, some of them nested, with sizes that 4 ranks share unevenly; Q, K and V are always cut evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding(11, 8)
        self.block = nn.ModuleDict(
            {
                "norm": ReplicatedLayerNorm(8),
                "qkv": ColumnParallelLinear(8, 24, weight_layout="in_out", specs=GPT2.module_specs("h.*.attn.c_attn")),
                "up": ColumnParallelLinear(8, 14),
                "down": RowParallelLinear(14, 8, bias=False),
            }
        )
        self.block["up"].bias.requires_grad_(False)


@dataclass(frozen=True)
class Parameter:
    """What a rank holds of a parameter."""

    local: torch.Tensor
    full: torch.Tensor
    before: torch.Tensor
    shape: tuple[int, ...]
    placements: tuple[object, ...]
    requires_grad: bool
    num_bytes: int


def _parallelize() -> tuple[dict[str, Parameter], list[tuple[int, int]]]:
    model = Model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert parallelize_module(model, mesh()) is model
    parameters = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert isinstance(parameter, DTensor)
        mine = parameter.to_local().detach()
        parameters[name] = Parameter(
            mine,
            parameter.full_tensor().detach(),
            before[name],
            tuple(parameter.shape),
            parameter.placements,
            parameter.requires_grad,
            mine.untyped_storage().nbytes(),
        )
    groups = [module.tp_group for module in model.modules() if isinstance(module, ParallelModule)]
    return parameters, [(tp.size, tp.rank) for tp in groups]


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_parameters_are_cut_and_stay_whole_to_the_outside(pool: Pool, tp_size: int) -> None:
    """Catches another rank's part, a placement that puts the parts together wrongly, a part that keeps the whole
    parameter in memory, a frozen parameter that learns, and a module that does not get to know its group."""
    for rank, (parameters, groups) in enumerate(pool(tp_size).run(_parallelize)):
        assert parameters.keys() == SPECS.keys()
        for name, parameter in parameters.items():
            spec = SPECS[name]
            assert torch.equal(parameter.local, spec.shard(parameter.before, tp_size, rank))
            assert torch.equal(parameter.full, parameter.before)
            assert parameter.shape == tuple(parameter.before.shape)
            assert parameter.placements == (placement_of(spec),)
            assert parameter.requires_grad == (name != "block.up.bias")
            assert parameter.num_bytes == parameter.local.numel() * 4
        assert groups == [(tp_size, rank)] * 5


def test_placements() -> None:
    """Catches a fused tensor that is placed as if it were cut into contiguous pieces."""
    assert placement_of(Replicated(used=FusedSplit(0, 3))) == Replicate()
    assert placement_of(Split(1)) == Shard(1)
    assert placement_of(VocabSplit()) == Shard(0)
    assert placement_of(FusedSplit(1, 3)) == _StridedShard(1, split_factor=3)


def test_the_plan_covers_all_modules_with_parameters() -> None:
    """Catches a module whose parameters would stay plain tensors among DTensors, and heads in the base model's plan."""
    plan = tp_plan_of(GPT2, modules=("h.*.attn",))
    assert set(plan.values()) == {STYLE_NAME}
    norms = {"h.*.ln_1", "h.*.ln_2", "ln_f"}
    linears = {"h.*.attn.c_attn", "h.*.attn.c_proj", "h.*.mlp.c_fc", "h.*.mlp.c_proj"}
    assert plan.keys() == {"wte", "wpe", "h.*.attn"} | norms | linears
    assert head_tp_plan_of(GPT2, "MegatronGPT2LMHeadModel") == {"lm_head": STYLE_NAME}
    assert head_tp_plan_of(GPT2, "MegatronGPT2Model") == {}


def _describe_group() -> tuple[bool, int, int]:
    tp = group()
    return tp.process_group is None, tp.size, tp.rank


def test_the_group_of_a_mesh(pool: Pool) -> None:
    """Catches a group of one rank that communicates, and a rank that is not the one in the mesh."""
    assert pool(1).run(_describe_group) == [(SINGLE.process_group is None, SINGLE.size, SINGLE.rank)]
    assert pool(4).run(_describe_group) == [(False, 4, rank) for rank in range(4)]


def _gradient_through_local() -> tuple[bool, torch.Tensor]:
    layer = RowParallelLinear(4, 2)
    parallelize_module(layer, mesh())
    part = local(layer.weight)
    (part * part.shape[1]).sum().backward()
    gradient = layer.weight.grad
    assert isinstance(gradient, DTensor)
    return isinstance(part, DTensor), gradient.full_tensor()


def test_local_parts_pass_their_gradient_on(pool: Pool) -> None:
    """Catches a local part that is detached from its parameter, or not a plain tensor."""
    for is_dtensor, gradient in pool(2).run(_gradient_through_local):
        assert not is_dtensor
        assert torch.equal(gradient, torch.full((2, 4), 2.0))
    plain = nn.Parameter(torch.ones(2))
    assert local(plain) is plain


def test_groups_compare_by_value() -> None:
    """Catches a handle that cannot be shared or compared, as modules of one model do."""
    assert TensorParallelGroup(None, 1, 0) == SINGLE
    assert len({TensorParallelGroup(None, 1, 0), SINGLE}) == 1
