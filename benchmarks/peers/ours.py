"""This package: straight from the stock checkpoint, every rank reading its own slices."""

from __future__ import annotations

from typing import Any

from transformers.distributed import DistributedConfig

from benchmarks.peers.competitors import Built, Setup
from benchmarks.peers.stock import with_options
from hf_megatron import MegatronBertForMaskedLM, MegatronGPT2LMHeadModel

__all__ = ["build"]

_CLASSES: dict[str, Any] = {"gpt2": MegatronGPT2LMHeadModel, "bert": MegatronBertForMaskedLM}


def build(setup: Setup) -> Built:
    """Load the model on one rank or cut over several."""
    layout = DistributedConfig(tp_size=setup.ranks) if setup.ranks > 1 else None
    model = _CLASSES[setup.workload.model].from_pretrained(
        setup.checkpoint,
        distributed_config=layout,
        dtype=setup.workload.torch_dtype,
        attn_implementation=setup.options.get("attention", "sdpa"),
    )
    if "recompute" in setup.options:
        model.activation_checkpointing_enable({"recompute": setup.options["recompute"]})
    return with_options(model.to(setup.device), setup)
