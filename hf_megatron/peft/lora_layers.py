"""LoRA layers whose matrices A and B are sharded like the weight they adapt.

Shapes: B batch, S sequence, ``r`` the adapter's rank; ``in`` and ``out`` are full sizes, ``in_p`` is this rank's part.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.distributed.tensor import DTensor

from hf_megatron.errors import UnsupportedError
from hf_megatron.tensor_parallel import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    TensorParallelGroup,
    local,
    parallelize_module,
)
from hf_megatron.tensor_parallel.random import sliced_dropout

ADAPTABLE = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)


def is_managed_by_fsdp(parameter: torch.Tensor) -> bool:
    """Whether FSDP shards a parameter; FSDP then gathers it for use and averages its gradient."""
    return isinstance(parameter, DTensor) and "fsdp" in (parameter.device_mesh.mesh_dim_names or ())


class ParallelLora(LoraLinear):
    """The LoRA layer of peft around one of our layers, with A and B replaced by sharded layers."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        # Sizes over all ranks; the stock method takes those of this rank's shard.
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, *args, **kwargs)
        base = self.get_base_layer()
        with torch.device("meta"):  # they take over the weights that peft drew, and must not draw any
            halves = _halves_of(base, r)
        for holder, half in zip((self.lora_A, self.lora_B), halves, strict=True):
            half.weight = holder[adapter_name].weight
            if isinstance(base.weight, DTensor):
                _share(half, base)
            holder[adapter_name] = half
        dropout = self.lora_dropout[adapter_name]
        if isinstance(base, RowParallelLinear) and isinstance(dropout, nn.Dropout) and base.tp_group.size > 1:
            self.lora_dropout[adapter_name] = _SplitDropout(dropout.p, base.in_features, base.tp_group)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As the stock method, but for ``safe_merge`` (ValueError if the sum is not finite), of no effect on DTensors.

        Collective: with ``safe_merge`` an all-reduce over tp of one number per adapter.
        """
        weight, group = self.get_base_layer().weight, self.get_base_layer().tp_group
        for adapter in check_adapters_to_merge(self, adapter_names) if safe_merge else ():
            if adapter in self.lora_A:
                is_finite = torch.isfinite(local(weight) + local(self.get_delta_weight(adapter))).all().float()
                if group.size > 1:
                    dist.all_reduce(is_finite, dist.ReduceOp.MIN, group=group.process_group)
                if not is_finite:
                    raise ValueError(f"merging the adapter {adapter!r} would make weights inf or nan.")
        super().merge(adapter_names=adapter_names)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The update that merging adds to the weight, sharded like the weight."""
        weight = self.get_base_layer().weight
        a, b = (local(half[adapter].weight) for half in (self.lora_A, self.lora_B))
        delta: torch.Tensor = b @ a * self.scaling[adapter]
        if getattr(self.get_base_layer(), "weight_layout", "out_in") == "in_out":
            delta = delta.t().contiguous()
        if not isinstance(weight, DTensor):
            return delta
        if is_managed_by_fsdp(weight):
            raise UnsupportedError(
                "an adapter cannot be merged into weights that FSDP has cut once more. Save the adapter, load it with "
                "fsdp_size=1 and dp_replicate_size=1, and merge it there."
            )
        return DTensor.from_local(
            delta, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )


class _SplitDropout(nn.Dropout):
    """Dropout on activations split on the last dim, with the mask of one rank for the full tensor of ``size``.

    So every degree trains on the same masks, and the generators of all ranks stay in step.
    """

    def __init__(self, p: float, size: int, group: TensorParallelGroup) -> None:
        super().__init__(p)
        self.size, self.group = size, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_p] to [..., in_p], split on the last dim."""
        return sliced_dropout(self.group, x, self.p, dim=-1, size=self.size) if self.training else x


def _halves_of(base: nn.Module, r: int) -> tuple[nn.Module, nn.Module]:
    """Create the layers A and B for an adapted layer, without weights."""
    if isinstance(base, ColumnParallelLinear):
        # The rows of B correspond to the columns of the weight and are split alike, in three blocks for a fused QKV.
        specs = {"weight": dataclasses.replace(base.partition_specs()["weight"], dim=0)}  # type: ignore[type-var]
        a = ReplicatedLinear(base.in_features, r, bias=False)
        return a, ColumnParallelLinear(r, base.out_features, bias=False, specs=specs)
    assert isinstance(base, (RowParallelLinear, ReplicatedLinear))
    a_class = RowParallelLinear if isinstance(base, RowParallelLinear) else ReplicatedLinear
    return a_class(base.in_features, r, bias=False), ReplicatedLinear(r, base.out_features, bias=False)


def _share(half: Any, base: Any) -> None:
    """Broadcast the weight of A or B from the first rank, and keep this rank's shard.

    Collective: broadcast over all processes.
    """
    if half.weight.device.type != "meta":
        dist.broadcast(half.weight.detach(), src=0)
    if base.tp_group.size > 1:
        parallelize_module(half, base.weight.device_mesh["tp"])
