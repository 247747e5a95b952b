"""This package on GPUs: tests, training, profile, decoding and memory, in one command.

    python -m benchmarks.gpu                                # writes results/gpu-NAME.{json,md}, NAME of the GPU
    python -m benchmarks.gpu --again profile                # this part once more, and what is not there yet
    python -m benchmarks.gpu --device cpu --quick           # tiny models on a CPU, to see that it runs

Each part is written when it is done, and a later run goes on with those that are not there; a part that fails is
reported and left out. What one wants to know first comes first. README.md beside this file tells how training steps and
decoding are measured. Needs Linux, and no package beyond the project's own requirements and pytest.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_decoding, bench_training_step
from benchmarks.command_line import make_parser
from benchmarks.peers.competitors import Configuration
from benchmarks.peers.fleet import Workers
from benchmarks.peers.report import markdown as training_tables
from benchmarks.peers.tables import milliseconds, table
from benchmarks.peers.worker import Job
from benchmarks.peers.workload import GPU_WORKLOADS, TINY_WORKLOADS, Workload, generate
from benchmarks.profile_training_step import kind_of
from benchmarks.records import RESULTS, environment, read, write

ROOT = Path(__file__).resolve().parent.parent
# Model and dropout, and whose steps are profiled.
PROFILED = {
    ("gpt2", 0.0): ("ours-tp1-1t", "stock-sdpa-tp1-1t"),
    ("gpt2", 0.1): ("ours-tp1-1t", "ours-compiled-tp1-1t"),
    ("bert", 0.1): ("ours-tp1-1t",),
}
# Calls in which the host waits: torch's own names of them on a GPU, and on a CPU what would be one there.
WAITS = {
    "cuda": ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    "cpu": ("aten::_local_scalar_dense", "aten::nonzero"),
}


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Args:
        device: ``cuda`` or ``cpu``.
        gpt2: The larger of the paper's models, or a tiny one.
        bert: The same.
        rounds: Samples of each configuration.
        repetitions: Steps per sample.
        new_tokens: To decode.
        ranks: Tensor-parallel degree; 1 where there is one GPU.
    """

    device: str
    gpt2: Workload
    bert: Workload
    rounds: int
    repetitions: int
    new_tokens: int
    ranks: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not there yet; the exit code is 1 if a part failed."""
    parser = make_parser(__doc__, "quick")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--again", nargs="+", default=[], metavar="PART", help=f"of {', '.join(PARTS)}")
    given = parser.parse_args(arguments)
    check(parser, given)
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / f"gpu-{device_name(given.device).replace(' ', '-')}.json"
    results, scale, failed = read(file), make_scale(given), []
    results["environment"] = {**environment("torch", "transformers"), "device": device_name(given.device)}
    for name, measure in PARTS.items():
        if name in results and name not in given.again:
            continue
        print(f"\n{name}", flush=True)
        try:
            found = measure(scale)
        except Exception as error:  # the next part may run, and a GPU is not lent for long
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        if found is not None:
            results[name] = found
            write(file, results)
            file.with_suffix(".md").write_text(markdown(results))
    print(f"\n{markdown(results)}\nin {file}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the next run tries them again.")


def check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Exit if the arguments ask for what is not there."""
    if unknown := set(given.again) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}.")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --quick tries the script without one.")
    if given.quick and given.output == RESULTS:
        given.output = Path(tempfile.mkdtemp())


def make_scale(given: argparse.Namespace) -> Scale:
    """The scale of these arguments."""
    ranks = 2 if given.device == "cpu" else min(torch.cuda.device_count(), 8)
    if given.quick:
        tiny = TINY_WORKLOADS
        return Scale(given.device, tiny["gpt2-tiny"], tiny["bert-tiny"], 2, 2, 4, ranks)
    return Scale(given.device, GPU_WORKLOADS["gpt2-1.2b"], GPU_WORKLOADS["bert-1.3b"], 5, 10, 128, ranks)


def device_name(device: str) -> str:
    """What torch calls the GPU, or ``cpu``."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


# ------------------------------------------------------------------ parts


def run_tests(scale: Scale) -> dict[str, Any]:
    """The tests marked ``gpu``; without one, those beside them that are for a CPU.

    They do not get the settings of pyproject.toml, which name plugins that a rented machine may lack.
    """
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    chosen = ["-m", "gpu", *files] if scale.device == "cuda" else ["-k", "cpu", f"{ROOT}/tests/models/test_devices.py"]
    settings = ["-c", "/dev/null", "--rootdir", str(ROOT), "--import-mode=importlib", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *settings, *chosen]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", lines[-1] if lines else "")
    }
    if not counts:
        raise RuntimeError("\n".join(lines[-20:]) or "pytest printed nothing")
    return {"counts": counts, "failed": failed}


def profile(scale: Scale) -> list[dict[str, Any]]:
    """Of steps: time on the device, the share of matrix products, and how often the host waits for the device."""
    return [
        {"model": model, "dropout": dropout, "configuration": name, **found}
        for (model, dropout), names in PROFILED.items()
        for name, found in _profiled(scale.device, replace(getattr(scale, model), dropout=dropout), names)
    ]


def _profiled(device: str, workload: Workload, names: Sequence[str]) -> Iterator[tuple[str, dict[str, float]]]:
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = generate(workload, Path(directory) / "checkpoint")
        for name in names:
            job = Job(Configuration.parse(name), workload, str(checkpoint), device)
            with Workers(job, Path(directory)) as workers:
                workers.hello()
                for command in ("load", "check"):
                    workers.ask(command)
                rows = workers.ask("profile 1000000")[0]["operators"]
            yield name, summary(rows, device)


def summary(rows: Sequence[Mapping[str, Any]], device: str) -> dict[str, float]:
    """What the operators of a profile add up to."""
    total = sum(row["seconds"] for row in rows)
    products = sum(row["seconds"] for row in rows if kind_of(row["operator"]) == "matrix products")
    waits = sum(row["calls"] for row in rows if row["operator"] in WAITS[device])
    return {"seconds": total, "products": products / total, "waits": waits}


def train(model: str, scale: Scale) -> dict[str, Any]:
    """A model in one process beside stock transformers, compiled and not, and the planner beside the allocator."""
    return _measured(scale, getattr(scale, model), bench_training_step.CONFIGURATIONS["cuda", model].split())


def train_in_parallel(scale: Scale) -> dict[str, Any] | None:
    """GPT-2 over all GPUs, in one tensor-parallel group; nothing where there is one GPU."""
    names = [f"ours-tp{ranks}-1t" for ranks in range(scale.ranks, 0, -1) if ranks in (1, 2, 4, 8)]
    return _measured(scale, scale.gpt2, names) if scale.ranks > 1 else None


def _measured(scale: Scale, workload: Workload, names: Sequence[str]) -> dict[str, Any]:
    setting = bench_training_step.Setting(
        rounds=scale.rounds,
        device=scale.device,
        repetitions=scale.repetitions,
        max_foreign_cores=float("inf"),
        max_seconds=120,
        search_paths={},
    )
    return bench_training_step.measure(workload, [Configuration.parse(name) for name in names], setting)


def decode(scale: Scale) -> dict[str, Any]:
    """Tokens per second of GPT-2 in one process, beside stock transformers."""
    workloads = {"gpt2": replace(scale.gpt2, batch=1)}
    labels = ("gpt2 ours-tp1-1t", "gpt2 stock-sdpa-tp1-1t")
    return bench_decoding.measure(workloads, scale.new_tokens, scale.rounds, float("inf"), labels, scale.device)


PARTS: Mapping[str, Callable[[Scale], Any]] = {
    "tests": run_tests,
    "profile": profile,
    "gpt2": partial(train, "gpt2"),
    "bert": partial(train, "bert"),
    "decoding": decode,
    "tensor parallel": train_in_parallel,
}


def markdown(results: Mapping[str, Any]) -> str:
    """All that was measured, as tables."""
    parts = []
    if tests := results.get("tests"):
        counts = ", ".join(f"{number} {word}" for word, number in tests["counts"].items())
        parts.append("\n".join([f"Tests: {counts}.", *tests["failed"]]))
    if profiled := results.get("profile"):
        head = ("configuration", "dropout", "device ms", "matrix products", "host waits")
        lines = (
            (
                f"{row['model']} {row['configuration']}",
                f"{row['dropout']}",
                milliseconds(row["seconds"]),
                f"{row['products']:.0%}",
                f"{row['waits']}",
            )
            for row in profiled
        )
        parts.append(table(head, lines))
    if trained := {name: results[name] for name in ("gpt2", "bert", "tensor parallel") if name in results}:
        parts.append(training_tables(trained))
    if "decoding" in results:
        parts.append(table(bench_decoding.HEAD, bench_decoding.rows(results["decoding"])))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
