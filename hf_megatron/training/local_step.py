"""Optimizer step and gradient clipping on each rank's shards, without DTensor's dispatcher.

Through the dispatcher, a step of torch's fused AdamW takes several times as long on the host, and clipping ten times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from math import prod
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hf_megatron.errors import UnsupportedError
from hf_megatron.tensor_parallel.group import like, shard_of

# Optimizers that treat each element by itself, so that a shard is stepped like a whole parameter.
_ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
_MARK = "_steps_on_shards"
_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


def step_on_shards(optimizer: _Optimizer) -> _Optimizer:
    """Make an optimizer of DTensors step on this rank's shards, plain tensors; the numbers are the same.

    It has an effect on those optimizers of torch that treat each element by itself, such as AdamW and SGD; others see a
    parameter as a whole, and are left as they are. ``MegatronTrainer`` does this itself. Outside of a step, parameters,
    ``state`` and ``state_dict()`` are those of the DTensors; change what is in ``state`` in place.

    Returns:
        The same optimizer.
    """
    if type(optimizer) not in _ELEMENTWISE or _MARK in vars(optimizer):
        return optimizer
    step, shards = optimizer.step, _Shards(optimizer)

    @wraps(step.__func__)  # type: ignore[attr-defined]
    def step_locally(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        if closure is not None:  # computes gradients, of DTensors
            return step(closure)
        with shards.in_place_of_dtensors():
            return step()

    # Schedulers of the learning rate wrap the method, and look for its function.
    optimizer.step = MethodType(step_locally, optimizer)  # type: ignore[method-assign]
    setattr(optimizer, _MARK, shards)
    return optimizer


class _Shards:
    """An optimizer's state by shard. It has the memory of the state by DTensor, which a step changes in place."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._by_dtensor: Any = None
        self._by_shard: Any = None

    @contextmanager
    def in_place_of_dtensors(self) -> Iterator[None]:
        """The optimizer has shards in ``param_groups`` and ``state``, with their gradients."""
        optimizer = self._optimizer
        state, groups = optimizer.state, [(group, group["params"]) for group in optimizer.param_groups]
        if state is not self._by_dtensor or len(state) != len(self._by_shard):  # the first step, or another state
            self._by_dtensor, self._by_shard = state, defaultdict(dict)
            for parameter, entry in state.items():
                self._by_shard[shard_of(parameter)] = {name: _shard(value) for name, value in entry.items()}
        try:
            optimizer.state = self._by_shard
            for group, parameters in groups:
                group["params"] = [_with_gradient(parameter) for parameter in parameters]
            yield
        finally:
            optimizer.state = state
            for group, parameters in groups:
                if len(state) != len(self._by_shard):
                    self._add_new(parameters)
                for parameter, shard in zip(parameters, group["params"], strict=True):
                    if shard is not parameter:
                        shard.grad = None
                group["params"] = parameters

    def _add_new(self, parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            entry = self._by_shard.get(shard_of(parameter))
            if entry is not None and parameter not in self._by_dtensor:
                self._by_dtensor[parameter] = {name: _like(parameter, value) for name, value in entry.items()}


def _with_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The shard of a parameter, with the shard of its gradient as ``grad``."""
    if not isinstance(parameter, DTensor):
        return parameter
    shard, gradient = parameter._local_tensor, parameter.grad
    shard.grad = None if gradient is None else gradient._local_tensor  # type: ignore[attr-defined]
    return shard


def _shard(value: Any) -> Any:
    return shard_of(value) if isinstance(value, torch.Tensor) else value


def _like(parameter: torch.Tensor, value: Any) -> Any:
    """A value of a shard's state as one of the parameter's: what has the shard's shape becomes a DTensor."""
    has_shape = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == shard_of(parameter).shape
    return like(parameter, value) if has_shape else value


def clip_grad_norm_(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for parameters of which some are DTensors, of one or several meshes.

    Args:
        parameters: Those whose gradients are scaled in place so that their 2-norm together is at most ``max_norm``.
        max_norm: infinity only measures.

    Returns:
        The norm before, a scalar of at least float32, replicated. Nothing is read back from the device.

    Collective: for each mesh of the parameters, an all-reduce of one number over each of its dimensions.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    by_mesh: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    squares = [_sum_of_squares(mesh, of_mesh) for mesh, of_mesh in by_mesh.items()]
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    if max_norm != float("inf"):
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        by_kind: dict[Any, list[torch.Tensor]] = {}
        for gradient in gradients:
            shard = shard_of(gradient)
            by_kind.setdefault((shard.device, shard.dtype), []).append(shard)
        for (device, _), shards in by_kind.items():
            torch._foreach_mul_(shards, scale.to(device))
    return norm


def _sum_of_squares(mesh: DeviceMesh | None, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of gradients on one mesh, or of plain ones; each element counts once. A scalar, replicated."""
    is_double = any(gradient.dtype == torch.float64 for gradient in gradients)
    dtype, device = torch.float64 if is_double else torch.float32, shard_of(gradients[0]).device
    by_copies: dict[int, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(_num_copies(gradient), []).append(shard_of(gradient))
    squares = torch.zeros((), dtype=dtype, device=device)
    for copies, shards in by_copies.items():  # each rank adds its part of a copy, so that nan on any of them shows
        norms = torch._foreach_norm(shards, 2.0, dtype=dtype)
        squares += torch.stack([norm.to(device) for norm in norms]).square().sum() / copies
    for dim in range(0 if mesh is None else mesh.ndim):
        dist.all_reduce(squares, group=mesh.get_group(dim))  # type: ignore[union-attr]
    return squares


def _num_copies(gradient: torch.Tensor) -> int:
    """On how many ranks the same shard lies."""
    if not isinstance(gradient, DTensor):
        return 1
    if any(placement.is_partial() for placement in gradient.placements):
        raise UnsupportedError(f"a gradient is a partial sum ({gradient.placements}); reduce it first.")
    sizes = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
    return prod(size for placement, size in sizes if placement.is_replicate())
