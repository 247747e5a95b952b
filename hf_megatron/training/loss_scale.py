"""The loss scale of training in float16, the same on all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class SharedGradScaler(torch.amp.GradScaler):
    """Gradient scaler shared by all ranks: an overflow on one rank makes all skip the step and lower the scale.

    Each rank sees its own part of the gradients. The stock class synchronizes only if the very first gradient is a
    sharded DTensor, which is not the case for adapters (whose first matrix is replicated) or plain tensors. torch's
    sharded scaler for FSDP uses a flag whose shape fused optimizers do not accept. The scale begins, grows and
    shrinks as the given scaler's.
    """

    def __init__(self, device: str, scaler: torch.amp.GradScaler) -> None:
        super().__init__(
            device,
            init_scale=scaler.get_scale(),
            growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(),
            growth_interval=scaler.get_growth_interval(),
        )

    def _unscale_grads_(self, *args: Any, **kwargs: Any) -> dict[torch.device, torch.Tensor]:
        """As the stock method.

        Collective: all-reduce over all processes of one flag per device.
        """
        flags: dict[torch.device, torch.Tensor] = super()._unscale_grads_(*args, **kwargs)
        for flag in flags.values():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flags
