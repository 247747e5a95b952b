"""What it costs that tensor-parallel ranks compare what must be equal, next to a training step.

    python -m benchmarks.bench_rank_checks            # writes results/rank_checks.json
    python -m benchmarks.bench_rank_checks --quick    # a tiny model, to see that it runs

Two ranks on one core each take steps of a GPT-2 of hidden size 1024, and between them do what MegatronTrainer does: the
exchange of two integers that each step has, and the comparison of batch, random state and replicated parameters that
every hundredth has. Times are processor seconds of one rank, medians; the wait for the other rank is not in them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers.distributed import DistributedConfig

from benchmarks import records
from benchmarks.command_line import make_parser, parse
from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.tensor_parallel.agreement import RankComparison, parameters_held_whole

NAME = "rank_checks"
WHOLE = {"n_embd": 1024, "n_head": 16, "n_layer": 4, "vocab_size": 50257, "n_positions": 1024}
QUICK = {"n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": 131, "n_positions": 64}
STEPS_PER_COMPARISON = 100


def _seconds(action: Callable[[], Any], rounds: int) -> float:
    """The median processor time of an action, after a first one that does not count."""
    action()
    samples = []
    for _ in range(rounds):
        dist.barrier()
        started = time.process_time()
        action()
        samples.append(time.process_time() - started)
    return statistics.median(samples)


def _rank(rank: int, sizes: dict[str, int], length: int, rounds: int, scratch: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/meeting", rank=rank, world_size=2)
    layout = DistributedConfig(tp_size=2)
    model = MegatronGPT2LMHeadModel.from_config(MegatronGPT2Config(**sizes), distributed_config=layout, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.randint(sizes["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    group = model.tp_group.process_group
    assert group is not None
    comparison = RankComparison.on_cpu(group)
    found = {
        "step": _seconds(step, rounds),
        "exchange": _seconds(lambda: comparison.agree("here", {}, 0), 50 * rounds),
        "comparison": _seconds(lambda: comparison.compare("here", model, batch), 5 * rounds),
    }
    if rank == 0:
        number = sum(tensor.numel() for _, tensor in parameters_held_whole(model))
        torch.save({**found, "replicated_parameters": number}, f"{scratch}/found")
    dist.destroy_process_group()


def measure(sizes: dict[str, int], length: int, rounds: int) -> dict[str, Any]:
    """Processor seconds of each, and the share that the checks take of a step."""
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(_rank, (sizes, length, rounds, scratch), nprocs=2)
        found: dict[str, Any] = torch.load(f"{scratch}/found")
    checks = found["exchange"] + found["comparison"] / STEPS_PER_COMPARISON
    return {"sizes": sizes, "tokens": length, "seconds": found, "share_of_a_step": checks / found["step"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    given, file = parse(make_parser(__doc__, "quick"), arguments, NAME)
    result = measure(QUICK, 32, 2) if given.quick else measure(WHOLE, 512, 7)
    records.write(file, {"environment": records.environment("torch"), **result})
    print(f"{file}: the checks take {result['share_of_a_step']:.3%} of a step's processor time")


if __name__ == "__main__":
    main()
