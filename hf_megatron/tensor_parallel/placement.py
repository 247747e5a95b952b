"""Shard a module's parameters over a device mesh: they become DTensors with the placement of their spec."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from hf_megatron.partition import FusedSplit, Replicated, Spec, Split
from hf_megatron.tensor_parallel.group import TensorParallelGroup
from hf_megatron.tensor_parallel.parallel_module import ParallelModule


def placement_of(spec: Spec) -> Placement:
    """The DTensor placement on a one-dimensional mesh that corresponds to ``spec``."""
    match spec:
        case Replicated():
            return Replicate()
        case Split(dim=dim):
            return Shard(dim)
        case FusedSplit(dim=dim, num_blocks=num_blocks):
            return _StridedShard(dim, split_factor=num_blocks)
    raise AssertionError(f"no placement for {spec}")


def shard_parameter(module: ParallelModule, name: str, mesh: DeviceMesh) -> None:
    """Replace one of a module's parameters by a DTensor that holds this rank's shard."""
    full = module._parameters.get(name)
    if full is None:
        return
    spec = module.partition_specs().get(name, Replicated())
    spec.check(f"{type(module).__name__}.{name}", tuple(full.shape), mesh.size())
    part = spec.shard(full.detach(), mesh.size(), mesh.get_local_rank()).clone(memory_format=torch.contiguous_format)
    sharded = DTensor.from_local(
        part, mesh, [placement_of(spec)], run_check=False, shape=full.shape, stride=full.stride()
    )
    module._parameters[name] = nn.Parameter(sharded, requires_grad=full.requires_grad)


def parallelize_module(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the parameters of all parallel modules in ``module`` over a one-dimensional mesh, in place.

    For standalone layers; models are sharded while they are loaded or built. Every rank must hold the same full
    parameters, and keeps its shard.
    """
    for child in module.modules():
        if isinstance(child, ParallelModule):
            for name in list(child._parameters):
                shard_parameter(child, name, mesh)
            child.set_tensor_parallel(TensorParallelGroup.from_mesh(mesh))
    return module
