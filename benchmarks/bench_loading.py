"""Loading a checkpoint at several degrees, next to stock ``from_pretrained`` and to ``cat``; and importing the package.

    python -m benchmarks.bench_loading                      # GPT-2 355M and 1.2B; writes results/loading.{json,md}
    python -m benchmarks.bench_loading --models gpt2-355m   # needs 4 GB of memory and 5 GB of disk instead of 12 and 15
    python -m benchmarks.bench_loading --quick              # a tiny one, to see that it runs

What is measured is told in README.md beside this file. Needs Linux.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.competitors import Configuration
from benchmarks.peers.fleet import Workers
from benchmarks.peers.rounds import Spread
from benchmarks.peers.tables import MEGA, machine, quartiles, table
from benchmarks.peers.worker import Job
from benchmarks.peers.workload import GPU_WORKLOADS, TINY_WORKLOADS, Workload, generate
from benchmarks.records import RESULTS, environment, read, write
from hf_megatron_conversion import convert

MODELS = ("gpt2-355m", "gpt2-1.2b")
STOCK, COPIED = "stock-sdpa-tp1-1t", "stock-copied-tp1-1t"
CONFIGURATIONS = (STOCK, COPIED, "ours-tp1-1t", "ours-tp2-1t", "ours-tp4-1t")
IMPORTS = {
    "transformers": "from transformers import AutoModel",
    "both": "import hf_megatron; from transformers import AutoModel",
}
# No rank takes more than 1.5/N of stock's load with copies and this: building the model, and wrapping its parameters.
CONSTANT_SECONDS = 0.65


def measure(workload: Workload, rounds: int, directory: Path | None) -> dict[str, Any]:
    """Load in turns with every configuration; only one of them holds a model at a time.

    Args:
        workload: The model.
        rounds: How often each loads it; a first time is not counted.
        directory: Where to write the checkpoints.
    """
    hello: dict[str, Any] = {}
    loads: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory(dir=directory) as name, ExitStack() as stack:
        scratch = Path(name)
        hub = generate(workload, scratch / "hub")
        (num_bytes,) = (file.stat().st_size for file in hub.glob("*.safetensors"))
        fleet = [
            stack.enter_context(Workers(Job(Configuration.parse(text), workload, str(hub)), scratch))
            for text in CONFIGURATIONS
        ]
        for workers in fleet:
            hello[workers.name] = workers.hello()
        runs: dict[str, Callable[[], list[Any]]] = {"cat": lambda: [_run("cat", *map(str, hub.glob("*.safetensors")))]}
        for workers in fleet:
            runs[workers.name] = partial(workers.ask, "load")
            degree = workers.configuration.ranks
            if degree > 1:
                shards = scratch / f"tp{degree}"
                convert(hub, shards, to="tp", tp_size=degree)
                runs[f"{workers.name}, tp directory"] = partial(workers.ask, f"load {shards}")
        for number in range(rounds + 1):
            for label, run in runs.items():
                replies = run()
                for workers in fleet:
                    if label.startswith(workers.name):
                        workers.ask("unload")
                if number:
                    loads.setdefault(label, []).append(replies)
    versions = hello["ours-tp1-1t"][0]["versions"]
    return {
        "workload": asdict(workload),
        "bytes": num_bytes,
        "environment": {**environment(), "versions": versions},
        "imports": {name: ranks[0]["resident"] for name, ranks in hello.items()},
        "loads": loads,
    }


def measure_imports(rounds: int) -> dict[str, Any]:
    """Importing transformers' Auto classes without this package and with it, in turns, each in a fresh interpreter."""
    seen: dict[str, Any] = {name: [] for name in IMPORTS}
    for number in range(rounds + 1):
        for name, statement in IMPORTS.items():
            reply = _run(sys.executable, "-c", statement)
            if number:
                seen[name].append([reply])
    return {"environment": environment("torch", "transformers", "hf-megatron"), "loads": seen}


def _run(*command: str) -> dict[str, float]:
    """Seconds that a command takes, and those of a processor."""
    search_path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=search_path)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "processor": processor}


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each model, and one for the imports."""
    memory = ("weights MB", "peak MB", "of it imports", "loading added MB")
    head = ("configuration", "seconds", "quartiles", "processor s", "allowed", "of stock's copies", *memory)
    parts = []
    for name, result in results.items():
        if name == "imports":
            parts.append(f"### Imports\n\n{machine(result['environment'])}")
            parts.append(table(("imported", "seconds", "processor s", "of transformers'"), _import_rows(result)))
            continue
        size = f"{result['bytes'] / 1e9:.2f} GB in {result['workload']['dtype']}"
        parts.append(f"### {name}\n\n{size}. {machine(result['environment'])}")
        parts.append(table(head, _rows(result)))
    return "\n\n".join(parts) + "\n"


def _slowest(loads: Sequence[Sequence[Mapping[str, float]]], what: str) -> Spread:
    """Of each time the rank for which it was most."""
    spread = Spread.of([max(rank[what] for rank in ranks) for ranks in loads])
    assert spread is not None
    return spread


def _rows(result: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    copied = _slowest(result["loads"][COPIED], "processor").median
    for name, loads in result["loads"].items():
        seconds, processor = _slowest(loads, "seconds"), _slowest(loads, "processor").median
        times = (f"{seconds.median:.2f}", quartiles(seconds, 2), f"{processor:.2f}")
        allowed = f"{1.5 / len(loads[0]) * copied + CONSTANT_SECONDS:.2f}" if name.startswith("ours") else ""
        row = (name, *times, allowed, f"{processor / copied:.2f}")
        if name == "cat":
            yield (*row, "", "", "", "")
            continue
        peak = statistics.median(max(rank["peak"]["resident"] for rank in ranks) for ranks in loads)
        added = statistics.median(max(rank["peak"]["resident"] - rank["before"] for rank in ranks) for ranks in loads)
        imports = result["imports"][name.partition(",")[0]]
        weights = max(rank["weights"] for rank in loads[0])
        yield *row, *(f"{number / MEGA:.0f}" for number in (weights, peak, imports, added))


def _import_rows(result: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    reference = _slowest(result["loads"]["transformers"], "processor").median
    for name, loads in result["loads"].items():
        seconds, processor = (_slowest(loads, what).median for what in ("seconds", "processor"))
        yield f"`{IMPORTS[name]}`", f"{seconds:.2f}", f"{processor:.2f}", f"{processor / reference:.2f}"


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
    # As many parameters, and almost no bytes: what the others take beyond this, they take for their bytes.
    workloads |= {f"{name}, narrow": replace(one, hidden=64, vocab=512) for name, one in workloads.items()}
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
    results["imports"] = measure_imports(given.rounds)
    write(file, results)
    print(f"\n{markdown(results)}")
    file.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
