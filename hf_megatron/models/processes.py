"""Helpers for process layout, shared by building, loading and saving."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_megatron.errors import ParallelStateError, UnsupportedError

_T = TypeVar("_T")


def check_distributed_config(config: DistributedConfig) -> None:
    """Reject pipeline stages, experts and a plan of the user's, and sizes that multiply to other than all processes."""
    if config.pp_size > 1 or config.ep_size > 1:
        raise UnsupportedError(
            f"pp_size={config.pp_size} and ep_size={config.ep_size}: these models have no pipeline stages and no "
            "experts. Use tp_size, fsdp_size and dp_replicate_size."
        )
    if isinstance(config.tp_plan, dict):
        raise UnsupportedError("tp_plan: these models bring their own plan. Leave tp_plan out, or 'auto'.")
    needed = config.tp_size * config.dp_size
    if needed == 1:
        return
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if needed != world_size:
        raise ParallelStateError(
            f"tp_size={config.tp_size} x fsdp_size={config.fsdp_size} x dp_replicate_size={config.dp_replicate_size} "
            f"needs {needed} processes, but there are {world_size}. Start with `torchrun --nproc-per-node {needed}`, "
            f"or choose sizes whose product is {world_size}."
        )


def refuse_quantization(quantization_config: object) -> None:
    """UnsupportedError if there is one: transformers quantizes ``nn.Linear`` modules, and these models have none."""
    if quantization_config is not None:
        raise UnsupportedError(
            "quantization_config: the layers of these models cannot be quantized. Save the model with stock=True and "
            "load that directory with the stock class, or leave quantization_config out."
        )


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait for all processes, if there are several."""
    if dist.is_initialized():
        dist.barrier(group)


def gather_objects(mine: _T, group: dist.ProcessGroup | None = None) -> list[_T]:
    """What each rank has given, by rank; every rank must call it.

    Collective: all-gather over all processes, pickled.
    """
    gathered = [mine]
    if dist.is_initialized():
        gathered *= dist.get_world_size()
        dist.all_gather_object(gathered, mine, group=group)
    return gathered


def share_failure(error: BaseException | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise an error on all ranks if one of them failed; every rank must call it, with what went wrong there, if any.

    Raises:
        BaseException: ``error`` itself, where there is one.
        ParallelStateError: Another rank has failed; the message has that rank's.

    Collective: all-gather over all processes of the message.
    """
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}", group)
    for rank, message in enumerate(messages):
        if message is not None and error is None:
            raise ParallelStateError(f"rank {rank} failed: {message}")
    if error is not None:
        raise error


@contextmanager
def one_process_allowed() -> Iterator[None]:
    """Silence torch's warning that a distributed checkpoint is handled without a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the report on missing weights."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
