"""Who computes: the names of the competitors, and what a builder is given and gives back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Self

from benchmarks.peers.workload import Batch, Workload

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["COMPETITORS", "Built", "Competitor", "Configuration", "Setup", "build"]


@dataclass(frozen=True)
class Competitor:
    """A way to compute a workload.

    Args:
        module: Module of this package with a function ``build(setup) -> Built``.
        models: The models it can compute.
        options: What distinguishes it from others of the same module.
        title: What a figure calls it.
    """

    module: str
    models: tuple[str, ...] = ("gpt2", "bert")
    options: Mapping[str, str] = field(default_factory=dict)
    title: str = field(kw_only=True)


COMPETITORS = {
    "ours": Competitor("ours", title="ours"),
    "ours-compiled": Competitor("ours", options={"compile": "yes"}, title="ours, compiled"),
    "ours-recomputed": Competitor("ours", options={"recompute": "full"}, title="ours, recomputed"),
    "ours-eager": Competitor("ours", options={"attention": "eager"}, title="ours, unfused attention"),
    "ours-eager-selective": Competitor(
        "ours", options={"attention": "eager", "recompute": "selective"}, title="ours, attention recomputed"
    ),
    "ours-eager-recomputed": Competitor(
        "ours", options={"attention": "eager", "recompute": "full"}, title="ours, unfused, recomputed"
    ),
    "stock-sdpa": Competitor("stock", ("gpt2", "llama"), {"attention": "sdpa"}, title="stock transformers"),
    "stock-copied": Competitor(
        "stock", ("gpt2",), {"attention": "sdpa", "copy": "yes"}, title="stock transformers, copied"
    ),
    "stock-compiled": Competitor(
        "stock", ("gpt2",), {"attention": "sdpa", "compile": "yes"}, title="stock transformers, compiled"
    ),
    "stock-eager": Competitor(
        "stock", ("gpt2", "bert"), {"attention": "eager"}, title="stock transformers"
    ),  # all that MegatronBert has
    "stock-eager-compiled": Competitor(
        "stock", ("gpt2", "bert"), {"attention": "eager", "compile": "yes"}, title="stock transformers, compiled"
    ),
    "dtensor": Competitor("dtensor", ("gpt2",), title="PyTorch's DTensor"),
    "megatron-core": Competitor("megatron_core", title="Megatron-core"),
    "transformers-tp": Competitor("transformers_tp", ("bert", "llama"), title="transformers' TP"),
}


@dataclass(frozen=True)
class Configuration:
    """A competitor on ``ranks`` processes with ``threads`` CPU threads each; written ``ours-tp2-1t``."""

    competitor: str
    ranks: int = 1
    threads: int = 1

    @property
    def name(self) -> str:
        """How it is written."""
        return f"{self.competitor}-tp{self.ranks}-{self.threads}t"

    @property
    def title(self) -> str:
        """The same in words: ``ours, 2 ranks``."""
        threads = f"one process, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{COMPETITORS[self.competitor].title}, {f'{self.ranks} ranks' if self.ranks > 1 else threads}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """The configuration that is written so.

        Raises:
            ValueError: It is not written like a configuration, or there is no such competitor.
        """
        match = re.fullmatch(r"(.+)-tp(\d+)-(\d+)t", name)
        if match is None or match[1] not in COMPETITORS:
            raise ValueError(f"{name!r}: write COMPETITOR-tpRANKS-THREADSt with one of {', '.join(COMPETITORS)}")
        return cls(match[1], int(match[2]), int(match[3]))


@dataclass(frozen=True)
class Setup:
    """What a builder is given, in the process that it builds in.

    Args:
        workload: What to compute.
        checkpoint: Directory with the weights, a stock checkpoint.
        rank: This process.
        ranks: How many there are; they have a process group if there are several.
        device: Where to compute.
        options: The competitor's.
    """

    workload: Workload
    checkpoint: Path
    rank: int
    ranks: int
    device: torch.device
    options: Mapping[str, str]


@dataclass(frozen=True)
class Built:
    """What a builder gives back.

    Args:
        model: The model in training mode, with the weights of the checkpoint.
        loss: Computes the mean loss of a batch, a scalar, equal on all ranks.
        position_embedding: Its parameter, which every competitor holds whole. Its gradient has come through all layers,
            so it tells whether two competitors computed the same backward pass.
        around_step: Entered around each forward and backward pass.
    """

    model: nn.Module
    loss: Callable[[Batch], torch.Tensor]
    position_embedding: nn.Parameter
    around_step: Callable[[], AbstractContextManager[None]] = nullcontext


def build(competitor: str, setup: Setup) -> Built:
    """Let the competitor's module build the model."""
    built: Built = import_module(f"benchmarks.peers.{COMPETITORS[competitor].module}").build(setup)
    return built
