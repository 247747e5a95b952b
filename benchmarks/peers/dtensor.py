"""GPT-2 written in plain torch, cut by ``torch.distributed.tensor``'s ``parallelize_module`` with ``loss_parallel``.

Query, key and value are three matrices, because ``ColwiseParallel`` cuts a fused one across their borders.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.peers.competitors import Built, Setup
from benchmarks.peers.workload import Batch, Workload

__all__ = ["build"]


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.query, self.key, self.value, self.output = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H] to [B, S, H]; the heads in between are those of this rank."""
        batch, sequence, _ = x.shape
        query, key, value = (
            linear(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: torch.Tensor = self.output(context.transpose(1, 2).reshape(batch, sequence, -1))
        return output


class _MLP(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.leave(F.gelu(self.enter(x), approximate="tanh"))
        return output


class _Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention, self.mlp = _Attention(hidden, heads), _MLP(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first_norm(x))
        output: torch.Tensor = x + self.mlp(self.second_norm(x))
        return output


class _GPT2(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        hidden = workload.hidden
        self.words, self.positions = nn.Embedding(workload.vocab, hidden), nn.Embedding(workload.sequence, hidden)
        self.blocks = nn.ModuleList([_Block(hidden, workload.heads) for _ in range(workload.layers)])
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, workload.vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, S] to logits [B, S, V], a DTensor cut on the last dim if the model is cut."""
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def _weights(checkpoint: Path, workload: Workload) -> Iterator[tuple[str, torch.Tensor]]:
    """The stock checkpoint's tensors under the names used here; stock stores matrices as [in, out]."""
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        read = file.get_tensor
        yield "words.weight", read("transformer.wte.weight")
        yield "head.weight", read("transformer.wte.weight")
        yield "positions.weight", read("transformer.wpe.weight")
        for kind in ("weight", "bias"):
            yield f"norm.{kind}", read(f"transformer.ln_f.{kind}")
        for index in range(workload.layers):
            theirs, ours = f"transformer.h.{index}.", f"blocks.{index}."
            for kind in ("weight", "bias"):
                fused = (
                    read(f"{theirs}attn.c_attn.{kind}").t() if kind == "weight" else read(theirs + "attn.c_attn.bias")
                )
                for name, part in zip(("query", "key", "value"), fused.chunk(3), strict=True):
                    yield f"{ours}attention.{name}.{kind}", part
                for name, stock in (
                    ("attention.output", "attn.c_proj"),
                    ("mlp.enter", "mlp.c_fc"),
                    ("mlp.leave", "mlp.c_proj"),
                ):
                    tensor = read(f"{theirs}{stock}.{kind}")
                    yield f"{ours}{name}.{kind}", tensor.t() if kind == "weight" else tensor
                yield f"{ours}first_norm.{kind}", read(f"{theirs}ln_1.{kind}")
                yield f"{ours}second_norm.{kind}", read(f"{theirs}ln_2.{kind}")


def _plan(workload: Workload) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        "words": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for index in range(workload.layers):
        block = f"blocks.{index}."
        # One DTensor for the three of them, so that their gradients are added up before they are all-reduced.
        plan[block + "attention"] = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
        )
        for name in ("attention.query", "attention.key", "attention.value", "mlp.enter"):
            plan[block + name] = ColwiseParallel()
        for name in ("attention.output", "mlp.leave"):
            plan[block + name] = RowwiseParallel()
    return plan


def build(setup: Setup) -> Built:
    """Load the whole model and cut it; head and embedding are one parameter."""
    workload = setup.workload
    with torch.device("meta"):
        model = _GPT2(workload).to(workload.torch_dtype)
    model.load_state_dict(dict(_weights(setup.checkpoint, workload)), assign=True)
    model.to(setup.device)
    if setup.ranks > 1:
        parallelize_module(model, init_device_mesh(setup.device.type, (setup.ranks,)), _plan(workload))
    model.head.weight = model.words.weight

    def loss(batch: Batch) -> torch.Tensor:
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1).float(), targets.flatten())

    positions = model.get_parameter("positions.weight")
    return Built(model, loss, positions, loss_parallel if setup.ranks > 1 else nullcontext)
