"""Check training arguments against the processes and the layout before the first step."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_megatron.errors import ParallelStateError, UnsupportedError


class AnyDeviceParallelismConfig(ParallelismConfig):
    """accelerate's parallelism configuration, allowed on CPUs too."""

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        if accelerator.device.type != "cpu":
            super()._validate_accelerator(accelerator)


def check_processes(args: Any) -> None:
    """ParallelStateError if arguments do not see the other processes; each rank would take itself for the only one."""
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    if args is not None and args.world_size != num_processes:
        raise ParallelStateError(
            f"there are {num_processes} processes, but TrainingArguments sees {args.world_size}. On a machine without "
            "a GPU, pass TrainingArguments(use_cpu=True)."
        )


def tp_size_of(model: Any) -> int:
    """The model's tensor-parallel degree; ``Trainer.get_tp_size()`` returns the accelerator's, which is set earlier."""
    return getattr(model, "tp_size", None) or 1


# Trainer's optimizers that update sharded parameters as one process would. The others treat shards as whole tensors,
# mix them with plain tensors, or have not been tested.
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


def check_layout(args: Any, model: Any, *, has_model_init: bool, has_optimizer: bool) -> None:
    """Refuse (UnsupportedError) what Trainer does per process where ranks act as one, or does not do on parts."""
    tp_size = tp_size_of(model)
    is_cut = isinstance(model, nn.Module) and any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if is_cut and not has_optimizer and args.optim not in _OPTIMIZERS:
        raise UnsupportedError(
            f"optim={str(getattr(args.optim, 'value', args.optim))!r} with parameters that are cut over ranks: this "
            f"optimizer is not known to step right on them. Known are {', '.join(_OPTIMIZERS)}; one of your own can be "
            "passed by optimizers=."
        )
    if isinstance(model, FSDPModule) and (args.bf16_full_eval or args.fp16_full_eval):
        raise UnsupportedError(
            "bf16_full_eval and fp16_full_eval cast the model before an evaluation, which FSDP cannot follow. Load the "
            "model with that dtype, or use bf16=True or fp16=True."
        )
    if tp_size == 1:
        return
    if has_model_init:
        raise UnsupportedError(
            f"model_init= with tp_size={tp_size}: Trainer lays out its data before it makes the model, so that the "
            "ranks of a group would read different batches. Make the model first, and pass model=."
        )
    if not args.average_tokens_across_devices:
        raise UnsupportedError(
            f"average_tokens_across_devices=False with tp_size={tp_size}: the ranks of a group hold the same tokens, "
            f"and the loss would be {tp_size} times too large. Leave it True."
        )
