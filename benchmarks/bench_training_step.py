"""A training step of ours next to what a user could take instead: time, memory, communication.

    python -m benchmarks.bench_training_step                  # the workloads for two CPU cores
    python -m benchmarks.bench_training_step --workloads gpt2-fp32 --megatron-core DIR
    python -m benchmarks.bench_training_step --device cuda    # the paper's sizes on one GPU
    python -m benchmarks.bench_training_step --redraw         # tables and figure of the data that is there
    python -m benchmarks.bench_training_step --quick          # tiny models, to see that it runs

Writes results/training_step.{json,md,png}. What is measured, and what it does not show, is told in README.md beside
this file. Needs Linux.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.agreement import check_same_work
from benchmarks.peers.competitors import COMPETITORS, Configuration
from benchmarks.peers.fleet import WorkerError, Workers
from benchmarks.peers.report import draw, markdown
from benchmarks.peers.rounds import MAX_FOREIGN_CORES, take_rounds
from benchmarks.peers.worker import Job
from benchmarks.peers.workload import GPU_WORKLOADS, TINY_WORKLOADS, WORKLOADS, Workload, generate
from benchmarks.records import RESULTS, environment, read, write

NAME = "training_step"
CONFIGURATIONS = {
    ("cpu", "gpt2"): "ours-tp2-1t ours-tp1-2t ours-tp1-1t megatron-core-tp2-1t dtensor-tp2-1t stock-sdpa-tp1-2t",
    (
        "cpu",
        "bert",
    ): "ours-tp2-1t ours-tp1-2t ours-tp1-1t megatron-core-tp2-1t transformers-tp-tp2-1t stock-eager-tp1-2t",
    ("cpu", "gpt2-fp32-200k"): "ours-tp2-1t megatron-core-tp2-1t",  # for its memory next to that with 50k
    ("cuda", "gpt2"): "ours-tp1-1t ours-compiled-tp1-1t ours-recomputed-tp1-1t stock-sdpa-tp1-1t stock-compiled-tp1-1t",
    ("cuda", "bert"): "ours-tp1-1t ours-compiled-tp1-1t stock-eager-tp1-1t stock-eager-compiled-tp1-1t",
}
MEMORY_SAMPLES = 3


@dataclass(frozen=True)
class Setting:
    """How a workload is measured.

    Args:
        rounds: Samples of each configuration.
        device: ``cpu`` or ``cuda``.
        repetitions: Steps per sample.
        max_foreign_cores: Processor time of others at which a sample is dropped.
        max_seconds: No round is begun after this time.
        search_paths: By competitor, a directory that it is imported from.
    """

    rounds: int
    device: str
    repetitions: int
    max_foreign_cores: float
    max_seconds: float
    search_paths: Mapping[str, Path]


def measure(workload: Workload, configurations: Sequence[Configuration], setting: Setting) -> dict[str, Any]:
    """All that is measured with one workload; a competitor that does not run is told of, and left out."""
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        checkpoint = generate(workload, scratch / "checkpoint")
        fleet = []
        for configuration in configurations:
            job = Job(configuration, workload, str(checkpoint), setting.device, setting.repetitions)
            fleet.append(Workers(job, scratch, setting.search_paths.get(configuration.competitor)))
            stack.enter_context(fleet[-1])
        for workers in list(fleet):
            try:
                found[workers.name] = first_look(workers)
                if setting.device == "cuda" and workers.name.startswith("ours"):
                    found[workers.name]["planned_bytes"] = planned_bytes(workload, workers.configuration)
            except WorkerError as error:
                print(error, file=sys.stderr)
                failed[workers.name] = str(error).splitlines()[-1]
                fleet.remove(workers)
        check_same_work(found, workload.product_dtype)
        samples = take_rounds(
            fleet, setting.rounds, max_foreign_cores=setting.max_foreign_cores, max_seconds=setting.max_seconds
        )
        for workers in fleet:
            found[workers.name] |= {"samples": samples[workers.name], "optimizer": workers.ask("optimizer")}
    versions: dict[str, str] = {}
    for configuration_found in found.values():
        versions |= configuration_found["hello"][0]["versions"]
    return {
        "workload": asdict(workload),
        "environment": {**environment(), "device": device_of(found), "versions": versions},
        "max_foreign_cores": setting.max_foreign_cores,
        "configurations": found,
        "failed": failed,
    }


def first_look(workers: Workers) -> dict[str, Any]:
    """What is measured once of a configuration; peak memory before there is an optimizer."""
    return {
        "hello": workers.hello(),
        "load": workers.ask("load"),
        "check": workers.ask("check"),
        "memory": [workers.ask("memory") for _ in range(MEMORY_SAMPLES)],
        "communication": workers.ask("communication"),
    }


def planned_bytes(workload: Workload, configuration: Configuration) -> int:
    """What the planner says that our model allocates at the most in such a step on a GPU, without an optimizer."""
    from hf_megatron.planning import PRECISIONS, ModelShape, Run, plan_memory

    options: Mapping[str, Any] = COMPETITORS[configuration.competitor].options
    plan = plan_memory(
        ModelShape.from_config(workload.stock_config().to_dict()),
        Run(
            micro_batch=workload.batch,
            sequence_length=workload.sequence,
            tp_size=configuration.ranks,
            recompute=options.get("recompute", "none"),
            attention=options.get("attention", "sdpa"),
            precision=PRECISIONS["fp32" if workload.dtype == "float32" else "bf16"],
            dropout=False,
            labelled=workload.labelled,
        ),
    )
    return plan.peak - plan.optimizer


def device_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of the GPU that was used, or of the processor."""
    names = {seen["hello"][0]["device"] for seen in found.values()} - {"cpu"}
    return str(names.pop()) if names else str(environment()["processor"])


def is_available(configuration: Configuration, workload: Workload, search_paths: Mapping[str, Path]) -> bool:
    """Whether the competitor can compute this model and is installed; megatron-core is not part of any environment."""
    if workload.model not in COMPETITORS[configuration.competitor].models:
        return False
    if configuration.competitor != "megatron-core" or "megatron-core" in search_paths:
        return True
    return importlib.util.find_spec("megatron") is not None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help=f"of {', '.join((*WORKLOADS, *GPU_WORKLOADS))}")
    parser.add_argument(
        "--configurations", nargs="+", metavar="NAME", help="such as ours-tp2-1t: 2 ranks, 1 thread each"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repetitions", type=int, help="steps per sample; default: 1 on a CPU, 10 on a GPU")
    parser.add_argument("--batch", type=int, help="sequences per step, instead of the workload's")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no round of a workload after this time"
    )
    parser.add_argument("--max-foreign-cores", type=float, default=MAX_FOREIGN_CORES)
    parser.add_argument("--megatron-core", type=Path, metavar="DIR", help="unpacked wheels of megatron-core and triton")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory to write to")
    parser.add_argument("--redraw", action="store_true", help="tables and figure of an earlier run")
    parser.add_argument("--quick", action="store_true", help="tiny models and two rounds, to see that it runs")
    given = parser.parse_args(arguments)
    if given.quick:
        given.workloads, given.rounds, given.max_foreign_cores = list(TINY_WORKLOADS), 2, float("inf")
        if given.output == RESULTS:
            given.output = Path(tempfile.mkdtemp())  # the figures that are kept are those of a whole run
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for, keep what was measured before of the rest, and write everything."""
    given = parse(arguments)
    file = given.output / f"{NAME}.json"
    results = read(file)
    every = {**WORKLOADS, **GPU_WORKLOADS, **TINY_WORKLOADS}
    default = WORKLOADS if given.device == "cpu" else GPU_WORKLOADS
    setting = Setting(
        rounds=given.rounds,
        device=given.device,
        repetitions=given.repetitions or (1 if given.device == "cpu" else 10),
        max_foreign_cores=given.max_foreign_cores,
        max_seconds=60 * given.minutes,
        search_paths={"megatron-core": given.megatron_core.resolve()} if given.megatron_core else {},
    )
    for name in [] if given.redraw else given.workloads or list(default):
        workload = replace(every[name], batch=given.batch) if given.batch else every[name]
        default_names = CONFIGURATIONS.get((given.device, name)) or CONFIGURATIONS[given.device, workload.model]
        wanted = given.configurations or default_names.split()
        configurations = [Configuration.parse(text) for text in wanted]
        available = [c for c in configurations if is_available(c, workload, setting.search_paths)]
        print(f"\n{name}: {', '.join(c.name for c in available)}", flush=True)
        results[name] = measure(workload, available, setting)
        write(file, results)  # now, so that an interruption costs one workload
    tables = markdown(results)
    print(f"\n{tables}")
    file.with_suffix(".md").write_text(tables)
    draw(results, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
