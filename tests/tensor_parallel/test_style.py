"""Modules that are cut on their own, and the group they get to know."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from hf_megatron.architectures import GPT2
from hf_megatron.partition import FusedSplit, Replicated, Split, VocabSplit
from hf_megatron.tensor_parallel import SINGLE, ColumnParallelLinear, RowParallelLinear, parallelize_module
from hf_megatron.tensor_parallel.placement import placement_of
from tests.live import on_live_ranks
from tests.tensor_parallel.ranks import TP_SIZES, mesh


def test_placements() -> None:
    """Catches a fused tensor that is placed as if it were cut into contiguous pieces."""
    assert placement_of(Replicated(used=FusedSplit(0, 3))) == Replicate()
    assert placement_of(Split(1)) == Shard(1)
    assert placement_of(VocabSplit()) == Shard(0)
    assert placement_of(FusedSplit(1, 3)) == _StridedShard(1, split_factor=3)


@pytest.mark.parametrize("world_size", TP_SIZES)
@on_live_ranks()
def test_parameters_are_cut_and_stay_whole_to_the_outside(world_size: int) -> None:
    """Catches another rank's part, one that keeps the whole alive, a frozen weight that learns, a module left large."""
    fused = ColumnParallelLinear(8, 24, weight_layout="in_out", specs=GPT2.module_specs("h.*.attn.c_attn"))
    model = nn.ModuleDict({"fused": fused, "row": RowParallelLinear(14, 8, bias=False)})  # 14 over 4: 4, 4, 4, 2
    fused.weight.requires_grad_(False)
    specs = {"fused.weight": FusedSplit(1, num_blocks=3), "fused.bias": Replicated(), "row.weight": Split(1)}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert 0.01 < before["row.weight"].std() < 0.03, "left as memory was"
    assert not before["fused.bias"].any()
    parallelize_module(model, mesh())
    group = fused.tp_group
    place = f", tp_size={group.size}, tp_rank={group.rank}" if group.size > 1 else ""
    assert repr(model["row"]) == f"RowParallelLinear(in_features=14, out_features=8, bias=False{place})"
    assert (group.size, group.rank) == (mesh().size(), mesh().get_local_rank())
    assert (group.process_group is SINGLE.process_group) == (group.size == 1), "one rank communicates"
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        part = parameter.to_local()
        assert torch.equal(part, specs[name].shard(before[name], group.size, group.rank)), name
        assert torch.equal(parameter.full_tensor(), before[name]), name
        assert part.untyped_storage().nbytes() == 4 * part.numel(), name
        assert parameter.requires_grad == (name != "fused.weight")
