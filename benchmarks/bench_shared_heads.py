"""What a number of heads that the degree does not divide costs: 25 heads on two ranks, next to 24 and 26.

    python -m benchmarks.bench_shared_heads          # writes results/shared_heads.{json,md}
    python -m benchmarks.bench_shared_heads --quick  # tiny heads, to see that it runs

GPT-2 of four layers and heads of 64 columns, one sequence of 256 tokens, forward and backward, all three in turns. What
25 heads are expected to cost is the mean of what 24 and 26 do, round by round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.command_line import make_parser, parse
from benchmarks.peers.competitors import Configuration
from benchmarks.peers.fleet import Workers
from benchmarks.peers.rounds import MAX_FOREIGN_CORES, Spread, take_rounds
from benchmarks.peers.tables import MEGA, machine, quartiles, table
from benchmarks.peers.worker import Job
from benchmarks.peers.workload import Workload, generate
from benchmarks.records import environment, read, write

NAME = "shared_heads"
HEADS = (24, 25, 26)
FIGURES = {"step": "seconds of a step", "processor": "processor seconds of a rank"}


def measure(workloads: dict[str, Workload], rounds: int, max_foreign_cores: float) -> dict[str, Any]:
    """Samples, memory and collectives of each workload on two ranks of one thread."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        fleet, found = [], {}
        for heads, workload in workloads.items():
            checkpoint = generate(workload, Path(name) / f"checkpoint-{heads}")
            job = Job(Configuration("ours", 2, 1), workload, str(checkpoint))
            fleet.append(stack.enter_context(Workers(job, Path(name), name=heads)))
        for workers in fleet:
            versions = workers.hello()[0]["versions"]
            workers.ask("load")
            memory = [rank["peak"]["resident"] - rank["before"] for rank in workers.ask("memory")]
            found[workers.name] = {"memory": max(memory), "communication": workers.ask("communication")[0]}
        samples = take_rounds(fleet, rounds, max_foreign_cores=max_foreign_cores)
    return {
        "workloads": {heads: asdict(workload) for heads, workload in workloads.items()},
        "environment": {**environment(), "versions": versions},
        "configurations": {heads: {**found[heads], "samples": taken} for heads, taken in samples.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """A row for each figure: of each number of heads, and of the middle one over the mean of its neighbours."""
    few, middle, many = result["configurations"]
    rows = []
    for figure, title in FIGURES.items():
        taken = [[s[figure] for s in result["configurations"][heads]["samples"]] for heads in (few, middle, many)]
        spreads = [Spread.of(numbers) for numbers in taken]
        ratio = Spread.of([2 * b / (a + c) for a, b, c in zip(*taken, strict=True)])
        assert ratio is not None
        rows.append(
            (title, *(f"{spread.median:.3f}" for spread in spreads if spread), ratio.median, quartiles(ratio, 2))
        )
    for title, number in (("memory of a step, MB", _memory), ("sent and received, MB", _communication)):
        a, b, c = (number(result["configurations"][heads]) / MEGA for heads in (few, middle, many))
        rows.append((title, f"{a:.2f}", f"{b:.2f}", f"{c:.2f}", 2 * b / (a + c), ""))
    cells = [[str(cell) for cell in (*row[:4], f"{row[4]:.3f}", row[5])] for row in rows]
    head = ["on each of two ranks", *(f"{heads} heads" for heads in (few, middle, many))]
    return f"{machine(result['environment'])}\n\n" + table([*head, "25 over the mean", "quartiles"], cells) + "\n"


def _memory(found: dict[str, Any]) -> float:
    return float(found["memory"])


def _communication(found: dict[str, Any]) -> float:
    return float(sum(sum(phase["bytes"].values()) for phase in found["communication"].values()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = make_parser(__doc__, "quick", "redraw")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--max-foreign-cores", type=float, default=MAX_FOREIGN_CORES)
    given, file = parse(parser, arguments, NAME)
    sizes: dict[str, Any] = {"layers": 4, "vocab": 4096}
    dim = 64
    if given.quick:
        sizes, dim, given.rounds, given.max_foreign_cores = (
            {"layers": 1, "vocab": 64, "sequence": 16},
            2,
            2,
            float("inf"),
        )
    if not given.redraw:
        workloads = {str(heads): Workload("gpt2", hidden=heads * dim, heads=heads, **sizes) for heads in HEADS}
        write(file, measure(workloads, given.rounds, given.max_foreign_cores))
    print(text := markdown(read(file)))
    file.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
