"""Mixed precision and recomputation: what each costs in time, and what it leaves in memory.

    python -m benchmarks.bench_recomputation            # writes results/recomputation.{json,md}
    python -m benchmarks.bench_recomputation --precisions fp32 --rounds 15
    python -m benchmarks.bench_recomputation --quick    # a tiny model on one rank, to see that it runs

What is measured, and what it does not show, is told in README.md beside this file. Needs Linux.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.command_line import make_parser, parse
from benchmarks.peers.agreement import check_same_work
from benchmarks.peers.competitors import COMPETITORS, Configuration
from benchmarks.peers.derived import ratio_of, spread_of
from benchmarks.peers.fleet import Workers
from benchmarks.peers.rounds import MAX_FOREIGN_CORES, take_rounds
from benchmarks.peers.tables import MEGA, machine, quartiles, table
from benchmarks.peers.worker import Job
from benchmarks.peers.workload import Workload, generate
from benchmarks.records import environment, read, write

NAME = "recomputation"
# The head, of which nothing is ever kept or recomputed, is small, so that the layers are what is seen.
WORKLOAD = Workload("gpt2", vocab=4096, sequence=512, batch=2)
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16 autocast": {"dtype": "float32", "autocast": "bfloat16"},
    "fp16 autocast": {"dtype": "float32", "autocast": "float16"},
    "bf16": {"dtype": "bfloat16"},
}
# The first is what the others are compared with: attention written out, nothing recomputed.
COMPETITORS_COMPARED = ("ours-eager", "ours-eager-selective", "ours-eager-recomputed", "ours")
LAYOUTS = ((2, 1), (1, 2))  # ranks and threads of each
MEMORY_SAMPLES = 2


def measure(
    workload: Workload,
    layouts: Sequence[tuple[int, int]],
    rounds: int,
    max_foreign_cores: float,
    max_seconds: float,
) -> dict[str, Any]:
    """Time and memory of a forward and a backward pass, of all configurations in turns."""
    found: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        checkpoint = generate(workload, scratch / "checkpoint")
        fleet: list[Workers] = []
        for configuration in (Configuration(who, *layout) for layout in layouts for who in COMPETITORS_COMPARED):
            job = Job(configuration, workload, str(checkpoint))
            fleet.append(stack.enter_context(Workers(job, scratch)))
        for workers in fleet:
            versions = workers.hello()[0]["versions"]
            workers.ask("load")
            found[workers.name] = {
                "check": workers.ask("check"),
                "activations": workers.ask("activations"),
                "memory": [workers.ask("memory") for _ in range(MEMORY_SAMPLES)],
            }
        check_same_work(found, workload.product_dtype)
        samples = take_rounds(fleet, rounds, max_foreign_cores=max_foreign_cores, max_seconds=max_seconds)
        for name, taken in samples.items():
            found[name]["samples"] = taken
    return {
        "workload": asdict(workload),
        "environment": {**environment(), "versions": versions},
        "max_foreign_cores": max_foreign_cores,
        "configurations": found,
    }


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each layout."""
    first = next(iter(results.values()))
    workload = Workload(**first["workload"])
    parts = [
        f"GPT-2, {workload.layers} layers, hidden {workload.hidden}, {workload.heads} heads, vocabulary "
        f"{workload.vocab}, {workload.batch} x {workload.sequence} tokens. {machine(first['environment'])}",
        "Step: forward and backward. Ratio: to the first line of the precision, round by round. Kept: what autograd "
        "holds at the end of the forward pass. Peak: the most resident memory, over what is there before the step.",
    ]
    head = ["precision", "attention", "recomputed", "step s", "quartiles", "ratio", "quartiles", "kept MB"]
    head += ["peak MB", "clean samples"]
    for ranks, threads in LAYOUTS:
        if Configuration(COMPETITORS_COMPARED[0], ranks, threads).name not in first["configurations"]:
            continue  # of a quick run
        rows = [row for precision, result in results.items() for row in _rows(precision, result, ranks, threads)]
        parts += [f"### TP={ranks}, threads of each rank: {threads}", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def _rows(precision: str, result: Mapping[str, Any], ranks: int, threads: int) -> Iterator[Sequence[str]]:
    base = Configuration(COMPETITORS_COMPARED[0], ranks, threads).name
    for competitor in COMPETITORS_COMPARED:
        name = Configuration(competitor, ranks, threads).name
        seen, options = result["configurations"][name], COMPETITORS[competitor].options
        spread, ratio = spread_of(result, name), ratio_of(result, name, base)
        memory = [max(rank["peak"]["resident"] - rank["before"] for rank in taken) for taken in seen["memory"]]
        kept = max(rank["kept"] for rank in seen["activations"])
        yield (
            precision,
            {"eager": "written out"}.get(options.get("attention", ""), "fused"),
            {"selective": "attention", "full": "layers"}.get(options.get("recompute", ""), "nothing"),
            *(("", "") if spread is None else (f"{spread.median:.3f}", quartiles(spread))),
            *(("", "") if ratio is None else (f"{ratio.median:.2f}", quartiles(ratio, 2))),
            f"{kept / MEGA:.0f}",
            f"{statistics.median(memory) / MEGA:.0f}",
            f"{0 if spread is None else spread.count} of {len(seen['samples'])}",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = make_parser(__doc__, "quick", "redraw")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no round of a precision after these")
    parser.add_argument("--max-foreign-cores", type=float, default=MAX_FOREIGN_CORES)
    given, file = parse(parser, arguments, NAME)
    workload = WORKLOAD
    layouts: Sequence[tuple[int, int]] = LAYOUTS
    if given.quick:
        layouts = LAYOUTS[1:]
        workload = Workload("gpt2", 2, 32, 4, vocab=128, sequence=16, batch=2)
        given.rounds, given.max_foreign_cores = 2, float("inf")
    results = read(file)
    for precision in [] if given.redraw else given.precisions:
        print(f"\n{precision}", flush=True)
        work = replace(workload, **PRECISIONS[precision])
        results[precision] = measure(work, layouts, given.rounds, given.max_foreign_cores, 60 * given.minutes)
        write(file, results)  # now, so that an interruption costs one precision
    print(f"\n{markdown(results)}")
    file.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
