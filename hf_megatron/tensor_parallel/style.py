"""How our modules meet transformers' tensor parallelism: one parallel style, and the placements it asks for.

transformers walks a plan of ``module or parameter name -> style`` and lets the style replace parameters by DTensors
and modules' forwards by wrapped ones. Ours asks each module for the cut of its parameters and wraps nothing: the
modules do their communication themselves.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

from hf_megatron.partition import FusedSplit, PartitionTable, Replicated, Spec, Split
from hf_megatron.tensor_parallel.group import TensorParallelGroup
from hf_megatron.tensor_parallel.layers import ParallelModule

__all__ = ["STYLE_NAME", "MegatronStyle", "head_tp_plan_of", "parallelize_module", "placement_of", "tp_plan_of"]

STYLE_NAME = "megatron"


def placement_of(spec: Spec) -> Placement:
    """The DTensor placement on a one-dimensional mesh that puts each rank's boxes of ``spec`` there."""
    match spec:
        case Replicated():
            return Replicate()
        case Split(dim=dim):
            return Shard(dim)
        case FusedSplit(dim=dim, num_blocks=num_blocks):
            return _StridedShard(dim, split_factor=num_blocks)
    raise AssertionError(f"no placement for {spec}")


class MegatronStyle(TensorParallelLayer):
    """The style behind every entry of our plans."""

    def shard_param(self, module: ParallelModule, param: str, mesh: DeviceMesh) -> None:
        """Replace one parameter by a DTensor that holds this rank's part of it."""
        full = module._parameters.get(param)
        if full is None:
            return
        spec = module.partition_specs().get(param, Replicated())
        part = spec.shard(full.detach(), mesh.size(), mesh.get_local_rank()).clone(
            memory_format=torch.contiguous_format
        )
        sharded = DTensor.from_local(
            part, mesh, [placement_of(spec)], run_check=False, shape=full.shape, stride=full.stride()
        )
        module._parameters[param] = nn.Parameter(sharded, requires_grad=full.requires_grad)

    def install_forward(self, module: ParallelModule, mesh: DeviceMesh) -> ParallelModule:
        """Tell the module its group; its forward stays its own."""
        module.set_tensor_parallel(TensorParallelGroup.from_mesh(mesh))
        return module


ALL_PARALLEL_STYLES.register(STYLE_NAME, MegatronStyle())


def tp_plan_of(table: PartitionTable, modules: tuple[str, ...] = ()) -> dict[str, str]:
    """The plan transformers wants for the base model: every module that holds parameters, and those named here.

    Args:
        table: The partition table.
        modules: Further modules that have no parameters of their own and need the group, such as the attention.
    """
    with_parameters = dict.fromkeys(rule.module for rule in table.body)
    return dict.fromkeys((*with_parameters, *modules), STYLE_NAME)


def head_tp_plan_of(table: PartitionTable, model_class: str) -> dict[str, str]:
    """The plan for the modules of a class's head."""
    return dict.fromkeys((rule.module for rule in table.model_class(model_class).head), STYLE_NAME)


def parallelize_module(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Cut the parameters of all parallel modules inside ``module`` over a one-dimensional mesh, in place.

    For layers used on their own; models are cut while they are loaded or built. Every rank must hold the same full
    parameters, and keeps its part.
    """
    style = MegatronStyle()
    for child in module.modules():
        if isinstance(child, ParallelModule):
            for name in list(child._parameters):
                style.shard_param(child, name, mesh)
            style.install_forward(child, mesh)
    return module
