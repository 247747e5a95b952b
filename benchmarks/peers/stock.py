"""Stock transformers on one process, with either of its attentions, compiled or not."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.competitors import Built, Setup
from benchmarks.peers.workload import Batch, Workload

__all__ = ["build", "with_options"]

for _model in ("gpt2", "bert", "llama"):
    Workload(_model).stock_class()  # imported now, so that loading a model does not take the time


def build(setup: Setup) -> Built:
    """Load the model.

    Raises:
        ValueError: On several ranks, which these classes do not know.
    """
    if setup.ranks != 1:
        raise ValueError(f"stock transformers computes on 1 rank, not {setup.ranks}")
    model = setup.workload.stock_class().from_pretrained(
        setup.checkpoint,
        dtype=setup.workload.torch_dtype,
        attn_implementation=setup.options["attention"],
    )
    if "copy" in setup.options:
        for parameter in model.parameters():  # out of the mapped file: the least that a load with copies can cost
            parameter.data = parameter.data.clone()
    return with_options(model.to(setup.device), setup)


def with_options(model: Any, setup: Setup) -> Built:
    """A model with the interface of transformers, in training, compiled if asked for."""
    model.train()
    if "compile" in setup.options:
        model.compile()

    autocast = getattr(torch, setup.workload.product_dtype) if setup.workload.autocast else None

    def loss(batch: Batch) -> torch.Tensor:
        with torch.autocast(setup.device.type, autocast, enabled=autocast is not None):
            value: torch.Tensor = model(**batch).loss
        return value

    probe = {
        "gpt2": "transformer.wpe.weight",
        "bert": "bert.embeddings.position_embeddings.weight",
        "llama": "model.norm.weight",
    }
    return Built(model, loss, model.get_parameter(probe[setup.workload.model]))
