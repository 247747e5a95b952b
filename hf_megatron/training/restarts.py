"""Ranks that ``torchrun`` has restarted find each other.

With torch 2.13, restarted ranks meet in the store of those before them, and gloo waits for addresses that are no more.
``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` gives each life a store of its own, with the rendezvous ``c10d``. This module
does it without, by the number of restarts. That is enough on a single node; several agents may count differently.

Source: https://github.com/pytorch/pytorch/issues/135712; ``torch.distributed.elastic.rendezvous.dynamic_rendezvous``.
"""

from __future__ import annotations

import logging
import os

import torch.distributed as dist

logger = logging.getLogger(__name__)

_server: list[dist.TCPStore] = []  # which has to live as long as the process


def use_fresh_store() -> None:
    """Point the environment at a store that this life's ranks have for themselves, if torchrun has not done so."""
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized() or _server:
        return
    has_nodes = environment["LOCAL_WORLD_SIZE"] != environment["WORLD_SIZE"]
    if has_nodes and environment["RANK"] == "0" and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        logger.warning(
            "Restarted ranks of several nodes may not find each other: start every torchrun with --rdzv-backend c10d, "
            "and with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment."
        )
    restarts = environment["TORCHELASTIC_RESTART_COUNT"]
    if restarts == "0":
        return
    address, key = environment["MASTER_ADDR"], f"hf_megatron/restart {restarts}"
    agent = dist.TCPStore(address, int(environment["MASTER_PORT"]), is_master=False)
    if environment["RANK"] == "0":
        _server.append(dist.TCPStore(address, 0, is_master=True, wait_for_workers=False))
        agent.set(key, str(_server[0].port))
    environment["MASTER_PORT"] = agent.get(key).decode()
