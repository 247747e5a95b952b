"""Where the time of a training step goes, by kind of work, on a CPU.

    python -m benchmarks.profile_training_step                          # one process, one thread
    torchrun --nproc-per-node 2 -m benchmarks.profile_training_step     # tensor parallel
    ... --dtype bfloat16 --output benchmarks/results/profile.json       # adds its figures to a file
    python -m benchmarks.profile_training_step --table                  # the committed figures, for docs/performance.md

GPT-2 with hidden 1024, 16 heads, 4 layers, vocabulary 50304, on 1 x 256 tokens, as in bench_training_step.py.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import profile
from transformers.distributed import DistributedConfig

from benchmarks.peers.tables import table
from benchmarks.records import RESULTS, read
from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel

HIDDEN, HEADS, LAYERS, VOCAB, TOKENS = 1024, 16, 4, 50304, 256
# What is counted as what: the first kind of which one name is part of the operation's.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "communication and waiting": ("c10d", "_Reduce", "_CopiedProduct", "_Copy", "_LinearCrossEntropy", "gloo"),
    "activation, norms": ("gelu", "layer_norm"),
    "DTensor": ("ToTorchTensor", "FromTorchTensor", "PythonSubclass"),
    "the loss's exponentials and sums": ("aten::exp_", "aten::sub", "aten::amax", "aten::sum"),
}
REST = "everything else"


def step(model: MegatronGPT2LMHeadModel, ids: torch.Tensor) -> None:
    """Forward and backward."""
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def kind_of(name: str) -> str:
    """The kind of work that an operation is."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)


def measure(dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Milliseconds of a step: the median without a profiler, and by kind, which add up to a step with it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "vocab_size": VOCAB, "n_positions": TOKENS}
    config = MegatronGPT2Config(**sizes, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    layout = DistributedConfig(tp_size=ranks) if ranks > 1 else None
    model = MegatronGPT2LMHeadModel.from_config(config, distributed_config=layout, seed=0, dtype=dtype).train()
    ids = torch.randint(VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    step(model, ids)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        step(model, ids)
        times.append(time.perf_counter() - started)
    with profile() as profiler:
        step(model, ids)
    kinds: defaultdict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e3
    flops = 6 * TOKENS * (12 * LAYERS * HIDDEN**2 + VOCAB * HIDDEN) + 12 * LAYERS * TOKENS**2 * HIDDEN
    return {
        "step": 1e3 * sorted(times)[len(times) // 2],
        **{kind: kinds[kind] for kind in (*KINDS, REST)},
        "GFLOP on a rank": flops / ranks / 1e9,
    }


def markdown(figures: Mapping[str, Mapping[str, float]]) -> str:
    """A column for each run of results/profile.json."""
    names = next(iter(figures.values()))
    return table(
        ("milliseconds", *figures), ((name, *(f"{run[name]:.0f}" for run in figures.values())) for name in names)
    )


def main() -> None:
    """Measure, print and add to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="a JSON file; what it has of other runs stays")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the committed figures")
    given = parser.parse_args()
    if given.table:
        print(markdown(read(RESULTS / "profile.json")))
        return
    torch.set_num_threads(1)
    figures = measure(getattr(torch, given.dtype), given.rounds)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("RANK", "0")) == 0:
        for name, value in figures.items():
            print(f"{name:34} {value:8.1f}")
        if given.output:
            known = json.loads(given.output.read_text()) if given.output.exists() else {}
            known[f"{given.dtype}, TP={ranks}"] = {name: round(value, 1) for name, value in figures.items()}
            given.output.write_text(json.dumps(known, indent=2) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
