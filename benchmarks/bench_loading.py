"""Loading a checkpoint at several degrees, next to stock ``from_pretrained``: seconds, and memory of each rank.

    python -m benchmarks.bench_loading                      # GPT-2 355M and 1.2B; writes results/loading.{json,md}
    python -m benchmarks.bench_loading --models gpt2-355m   # needs 2 GB of memory and of disk instead of 6
    python -m benchmarks.bench_loading --quick              # a tiny one, to see that it runs

What is measured is told in README.md beside this file. Needs Linux.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.competitors import Configuration
from benchmarks.peers.fleet import Workers
from benchmarks.peers.rounds import Spread
from benchmarks.peers.tables import MEGA, machine, quartiles, table
from benchmarks.peers.worker import Job
from benchmarks.peers.workload import GPU_WORKLOADS, TINY_WORKLOADS, Workload, generate
from benchmarks.records import RESULTS, environment, read, write

MODELS = ("gpt2-355m", "gpt2-1.2b")
CONFIGURATIONS = ("stock-sdpa-tp1-1t", "ours-tp1-1t", "ours-tp2-1t", "ours-tp4-1t")


def measure(workload: Workload, rounds: int, directory: Path | None) -> dict[str, Any]:
    """Load in turns with every configuration; only one of them holds a model at a time.

    Args:
        workload: The model.
        rounds: How often each loads it; a first time is not counted.
        directory: Where to write the checkpoint.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=directory) as name, ExitStack() as stack:
        scratch = Path(name)
        checkpoint = generate(workload, scratch / "checkpoint")
        fleet = [
            stack.enter_context(Workers(Job(Configuration.parse(text), workload, str(checkpoint)), scratch))
            for text in CONFIGURATIONS
        ]
        for workers in fleet:
            found[workers.name] = {"hello": workers.hello(), "loads": []}
        for number in range(rounds + 1):
            for workers in fleet:
                replies = workers.ask("load")
                workers.ask("unload")
                if number:
                    found[workers.name]["loads"].append(replies)
        num_bytes = (checkpoint / "model.safetensors").stat().st_size
    versions = found[CONFIGURATIONS[1]]["hello"][0]["versions"]
    return {
        "workload": asdict(workload),
        "bytes": num_bytes,
        "environment": {**environment(), "versions": versions},
        "configurations": found,
    }


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each model."""
    head = ("configuration", "seconds", "quartiles", "weights MB", "peak MB", "of it imports", "loading added MB")
    parts = []
    for name, result in results.items():
        size = f"{result['bytes'] / 1e9:.2f} GB in {result['workload']['dtype']}"
        parts.append(f"### {name}\n\n{size}. {machine(result['environment'])}")
        parts.append(table(head, _rows(result)))
    return "\n\n".join(parts) + "\n"


def _rows(result: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Of each configuration the slowest rank's time, and the memory of the rank that needs most."""
    for name, seen in result["configurations"].items():
        seconds = Spread.of([max(rank["seconds"] for rank in ranks) for ranks in seen["loads"]])
        assert seconds is not None
        peak = statistics.median(max(rank["peak"]["resident"] for rank in ranks) for ranks in seen["loads"])
        added = statistics.median(
            max(rank["peak"]["resident"] - rank["before"] for rank in ranks) for ranks in seen["loads"]
        )
        imports = seen["hello"][0]["resident"]
        weights = max(rank["weights"] for rank in seen["loads"][0])
        megabytes = (f"{number / MEGA:.0f}" for number in (weights, peak, imports, added))
        yield name, f"{seconds.median:.2f}", quartiles(seconds, 2), *megabytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's temporary directory")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory to write to")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round, to see that it runs")
    given = parser.parse_args(arguments)
    workloads = {name: replace(GPU_WORKLOADS[name], dtype="float32") for name in given.models}
    if given.quick:
        workloads, given.rounds = {"gpt2-tiny": TINY_WORKLOADS["gpt2-tiny"]}, 1
        if given.output == RESULTS:
            given.output = Path(tempfile.mkdtemp())
    file = given.output / "loading.json"
    results = read(file)
    for name, workload in workloads.items():
        print(name, flush=True)
        results[name] = measure(workload, given.rounds, given.directory)
        write(file, results)
    print(f"\n{markdown(results)}")
    file.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
