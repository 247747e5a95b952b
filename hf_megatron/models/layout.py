"""Small questions about the layout of processes that building, loading and saving share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_megatron.errors import ParallelStateError, UnsupportedError

__all__ = ["barrier", "check_distributed_config", "is_first_rank", "one_process_allowed", "quiet_loading"]


def check_distributed_config(config: DistributedConfig) -> None:
    """Refuse a layout these models do not have, or that does not fit the number of processes.

    Raises:
        UnsupportedError: Pipeline stages, experts, or a plan of the user's.
        ParallelStateError: The sizes multiply to another number than there are processes.
    """
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


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all processes, if there are several."""
    if dist.is_initialized():
        dist.barrier()


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
