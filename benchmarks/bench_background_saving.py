"""How long training stops for a checkpoint that is written in the background, beside one that it waits for.

    python -m benchmarks.bench_background_saving            # writes results/background_saving.json
    python -m benchmarks.bench_background_saving --quick    # a tiny model, to see that it runs

Two tensor-parallel ranks with one thread each train a GPT-2 of hidden size 768 and save it with Adam's state every few
steps; both ways of saving run in turns, each in processes of its own. Measured on rank 0, as medians over all saves:
how long training stops, how long it takes until the checkpoint has its name and is on disk, how much memory the ranks
have more while it is written, and how long a step takes meanwhile.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from benchmarks import records
from benchmarks.command_line import make_parser, parse
from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel, MegatronTrainer

NAME = "background_saving"
WHOLE = {"n_embd": 768, "n_head": 12, "n_layer": 4, "vocab_size": 50257, "n_positions": 64}
QUICK = {"n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": 131, "n_positions": 32}
WAYS = ("blocking", "background")


def _private_bytes() -> int:
    """This process's anonymous memory."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class _Steps(TrainerCallback):
    """When each step began and ended."""

    def __init__(self) -> None:
        self.times: list[list[float]] = []

    def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
        self.times.append([time.monotonic()])

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        self.times[-1].append(time.monotonic())


class _Timed(MegatronTrainer):
    """Notes when a save begins, lets training go on, and is complete; and the memory before and after."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.saves: dict[str, dict[str, float]] = {}  # by name of the checkpoint

    def _save_checkpoint(self, *arguments: Any) -> None:
        dist.barrier()  # the other rank's step is not part of it
        save = {"memory": float(_private_bytes()), "begin": time.monotonic()}
        self.saves[f"checkpoint-{self.state.global_step}"] = save
        super()._save_checkpoint(*arguments)
        save["continued"] = time.monotonic()
        save["memory"] = _private_bytes() - save["memory"]

    def _publish(self, run_directory: Path, destination: Path, *arguments: Any) -> None:
        super()._publish(run_directory, destination, *arguments)
        self.saves[destination.name]["complete"] = time.monotonic()


def _rank(rank: int, way: str, sizes: dict[str, int], plan: dict[str, int], port: int, scratch: str) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    arguments = TrainingArguments(
        f"{scratch}/run",
        use_cpu=True,
        max_steps=plan["steps"],
        save_steps=plan["save_steps"],
        save_total_limit=1,
        per_device_train_batch_size=1,
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    layout = DistributedConfig(tp_size=2)
    model = MegatronGPT2LMHeadModel.from_config(MegatronGPT2Config(**sizes), distributed_config=layout, seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(sizes["vocab_size"], (plan["steps"], sizes["n_positions"]), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer, steps = _Timed(model, arguments, train_dataset=data, background_saving=way == "background"), _Steps()
    trainer.add_callback(steps)
    trainer.train()
    if rank == 0:
        checkpoint = next(Path(arguments.output_dir).glob("checkpoint-*"))
        size = sum(path.stat().st_size for path in checkpoint.rglob("*"))
        torch.save({"saves": list(trainer.saves.values()), "steps": steps.times, "bytes": size}, f"{scratch}/found")
    dist.destroy_process_group()


def _run(way: str, sizes: dict[str, int], plan: dict[str, int]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(_rank, (way, sizes, plan, port, scratch), nprocs=2)
        found: dict[str, Any] = torch.load(f"{scratch}/found")
    return found


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    saves = [save for run in runs for save in run["saves"]]
    begun = [[save["continued"], save["complete"]] for save in saves]
    meanwhile: list[float] = []
    alone: list[float] = []
    for begin, end in (step for run in runs for step in run["steps"]):
        is_meanwhile = any(begin < complete and end > continued for continued, complete in begun)
        (meanwhile if is_meanwhile else alone).append(end - begin)
    return {
        "stall_seconds": statistics.median(save["continued"] - save["begin"] for save in saves),
        "longest_stall_seconds": max(save["continued"] - save["begin"] for save in saves),
        "complete_seconds": statistics.median(save["complete"] - save["begin"] for save in saves),
        "first_save_memory_bytes": statistics.median(run["saves"][0]["memory"] for run in runs),
        "step_seconds": statistics.median(alone),
        "step_seconds_while_writing": statistics.median(meanwhile) if meanwhile else None,
    }


def measure(sizes: dict[str, int], plan: dict[str, int], rounds: int) -> dict[str, Any]:
    """Seconds and bytes of each way, and the share of a blocking save's stall that a background save's takes."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            runs[way].append(_run(way, sizes, plan))
    found = {way: _summary(runs[way]) for way in WAYS}
    share = found["background"]["stall_seconds"] / found["blocking"]["stall_seconds"]
    sizes_of = {"sizes": sizes, "checkpoint_bytes": runs["blocking"][0]["bytes"], "rounds": rounds, **plan}
    return {**sizes_of, **found, "share_of_a_blocking_stall": share}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    given, file = parse(make_parser(__doc__, "quick"), arguments, NAME)
    if given.quick:
        result = measure(QUICK, {"steps": 4, "save_steps": 2}, 1)
    else:
        result = measure(WHOLE, {"steps": 12, "save_steps": 4}, 2)
    records.write(file, {"environment": records.environment("torch"), **result})
    print(f"{file}: the stall is {result['share_of_a_blocking_stall']:.1%} of that of a blocking save")


if __name__ == "__main__":
    main()
