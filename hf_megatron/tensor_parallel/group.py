"""The tensor-parallel process group, as stored in every parallel module."""

from __future__ import annotations

import atexit
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hf_megatron.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class TensorParallelGroup:
    """The tensor-parallel group of this process."""

    process_group: dist.ProcessGroup | None  # to communicate over; None when there is only one rank
    size: int  # number of ranks, the paper's degree of model parallelism
    rank: int  # this process's place among them

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh) -> TensorParallelGroup:
        """The group of a one-dimensional device mesh."""
        _wait_for_gloo_at_exit()
        if mesh.size() == 1:
            return SINGLE
        return cls(mesh.get_group(), mesh.size(), mesh.get_local_rank())

    def __deepcopy__(self, memo: dict[int, object]) -> TensorParallelGroup:
        # Copies of a module share the group; a process group cannot be copied.
        return self


SINGLE = TensorParallelGroup(None, 1, 0)
"""One process that holds everything; with it no layer communicates."""


@cache
def _wait_for_gloo_at_exit() -> None:
    """Let gloo's threads release the tensors of the last collectives before Python shuts down.

    A thread that does so later aborts the process, after all its work is done and even after
    ``destroy_process_group`` (pytorch/pytorch#190489).
    """
    atexit.register(time.sleep, 0.2)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter as a plain tensor; gradients flow back to the parameter.

    The gradient of the local part becomes the gradient of the DTensor with the parameter's own placement. For a
    replicated parameter that is right only if the gradient is already the same on every rank.
    """
    return local_all(parameter)[0]


def local_all(*parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """:func:`local` of parameters of which all are DTensors, or none is; faster for all of a module's together."""
    if not isinstance(parameters[0], DTensor):
        return parameters
    if torch.compiler.is_compiling():  # compilers know this form alone
        return tuple(parameter.to_local() for parameter in parameters)  # type: ignore[attr-defined]
    if not torch.is_grad_enabled():
        return tuple(shard_of(parameter) for parameter in parameters)
    shards: tuple[torch.Tensor, ...] = _Shards.apply(*parameters)
    return shards


def shard_of(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter, to which no gradient flows."""
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def like(parameter: torch.Tensor, of_shard: torch.Tensor) -> torch.Tensor:
    """What belongs to a parameter's shard, such as its gradient, as what belongs to the parameter."""
    if not isinstance(parameter, DTensor):
        return of_shard
    # The constructor of a subclass is slow, and this one empty.
    return DTensor.__new__(DTensor, of_shard, parameter._spec, requires_grad=False)


class _Shards(torch.autograd.Function):
    """``DTensor.to_local`` without DTensor's dispatcher, whose backward takes ten times as long on the host."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.parameters = parameters
        ctx.set_materialize_grads(False)
        return tuple([shard_of(parameter).detach() for parameter in parameters])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # `once_differentiable` would take longer than the rest of this
            raise UnsupportedError("create_graph=True: layers of several ranks have no second derivative.")
        pairs = zip(ctx.parameters, gradients, strict=True)
        return tuple([None if gradient is None else like(parameter, gradient) for parameter, gradient in pairs])


def non_finite_names(model: nn.Module) -> list[str]:
    """Names of the parameters whose local shard contains inf or nan; reads each shard once."""
    return [
        name
        for name, parameter in model.named_parameters()
        # A finite sum has only finite elements. A non-finite one needs a closer look: finite elements may overflow.
        if not parameter.is_meta
        and not torch.isfinite(local(parameter).detach().sum(dtype=torch.float32))
        and not torch.isfinite(local(parameter)).all()
    ]
