"""How fast and in how much memory checkpoints are converted, next to ``cp``, ``sha256sum`` and ``sync``.

    python -m benchmarks.bench_conversion                      # all of MODELS: writes results/conversion.json
    python -m benchmarks.bench_conversion --models gpt2-355m   # one of them; needs 5 GB of disk instead of 35
    python -m benchmarks.bench_conversion --quick              # tiny ones, to see that it runs

What is measured is told in README.md beside this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import make_parser, parse
from benchmarks.records import environment, read, write
from hf_megatron.architectures import GPT2
from hf_megatron.architectures.presets import PRESETS, Preset
from hf_megatron.checkpoint import itemsize

MEGA = 10**6
CHUNK = 2**20


MODELS = ("gpt2-355m", "bert-336m", "gpt2-2.5b")
LARGEST = "gpt2-8.3b"  # for the dry run


@dataclass(frozen=True)
class Direction:
    """A conversion: from the directory of one name to that of another."""

    source: str
    destination: str
    options: tuple[str, ...]


DIRECTIONS = (
    Direction("hub", "hub in files of 2 GB", ("--to", "hub", "--max-shard-size", "2GB")),
    Direction("hub", "tp 4", ("--to", "tp", "--tp", "4")),
    Direction("tp 4", "tp 2", ("--to", "tp", "--tp", "2")),
    Direction("tp 4", "hub", ("--to", "hub")),
    Direction("hub", "megatron-lm 4", ("--to", "megatron-lm", "--tp", "4")),
    Direction("megatron-lm 4", "megatron-lm 2", ("--to", "megatron-lm", "--tp", "2")),
    Direction("megatron-lm 4", "hub", ("--to", "hub")),
    Direction("hub", "megatron-core", ("--to", "megatron-core")),
    Direction("megatron-core", "hub", ("--to", "hub")),
    Direction("megatron-core", "tp 4", ("--to", "tp", "--tp", "4")),
)
LIMITS = ("60MB", "80MB", "100MB", "250MB")  # for --max-memory
DRY_RUNS = (("--to", "megatron-lm", "--tp", "8"), ("--to", "megatron-core"))


def directions_of(model: Preset) -> list[Direction]:
    """All of GPT-2; of BERT, whose matrices lie in files as Megatron-LM has them, those of Megatron-core."""
    return [d for d in DIRECTIONS if model.table is GPT2 or "megatron-core" in (d.source, d.destination)]


def tiny(model: Preset) -> Preset:
    """The same with 2 layers of 64."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256}
    named = {model.table.size_fields[size].name: value for size, value in sizes.items()}
    return replace(model, sizes={**model.sizes, **named})


def generate(directory: Path, model: Preset, *, is_sparse: bool = False) -> Path:
    """Write a stock checkpoint in float32; a sparse one takes no space, has all headers and holds zeros."""
    model_class = model.table.classes[0]
    config = model.table.config_of(model.sizes, model_class, stock=True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in model.table.tensors(config, model_class).items():
        stop = position + prod(tensor.shape) * itemsize("F32")
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    # One block of random numbers over and over.
    block = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if is_sparse:
            stream.truncate(stream.tell() + position)
        while position > 0 and not is_sparse:
            position -= stream.write(block[:position])
        os.fsync(stream.fileno())
    return directory


def files_of(directory: Path) -> list[Path]:
    """All files in it."""
    return [path for path in directory.rglob("*") if path.is_file()]


@dataclass(frozen=True)
class Cost:
    """Of a process: seconds on the clock, and seconds of processor time, in all its threads and in the kernel."""

    seconds: float
    cpu_seconds: float


def run(command: Sequence[object]) -> tuple[Cost, str]:
    """Run a command; what it cost, and its output."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(time.perf_counter() - started, cpu_seconds), done.stdout


def copy(source: Path, scratch: Path) -> Cost:
    """What ``cp`` and ``sync`` take to copy the source onto the disk."""
    costs = [run(command)[0] for command in (["cp", "-r", source, scratch], ["sync"])]
    shutil.rmtree(scratch)
    return Cost(sum(cost.seconds for cost in costs), sum(cost.cpu_seconds for cost in costs))


def checksum_seconds(source: Path, result: Path) -> float:
    """Processor time of the checksums that a conversion computes, by the same functions."""
    started = time.process_time()
    for path in (*files_of(source), *files_of(result)):
        sha256, crc = hashlib.sha256(), 0
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                sha256.update(chunk)
                crc = zlib.crc32(chunk, crc) if path.suffix in (".pt", ".distcp") else 0
    return time.process_time() - started


def convert(source: Path, destination: Path, options: tuple[str, ...]) -> tuple[Cost, dict[str, Any]]:
    """A conversion in a process of its own: what it cost, and what the command reports."""
    cost, out = run([sys.executable, "-m", "hf_megatron", "convert", source, destination, *options, "--json"])
    result: dict[str, Any] = json.loads(out)
    return cost, result


def measure(model: Preset, directory: Path, repetitions: int) -> Iterator[dict[str, Any]]:
    """Every direction, each next to the system's tools; of each part the run with the least processor time."""
    generate(directory / "hub", model)
    directions = directions_of(model)
    for index, direction in enumerate(directions):
        source = directory / direction.source
        # What comes back to "hub" must not replace the model that everything starts from.
        target = directory / ("hub again" if direction.destination == "hub" else direction.destination)
        runs, copies, sums, checksums = [], [], [], []
        for _ in range(repetitions):
            shutil.rmtree(target, ignore_errors=True)
            runs.append(convert(source, target, direction.options))
            copies.append(copy(source, directory / "scratch"))
            sums.append(run(["sha256sum", *files_of(source), *files_of(target)])[0])
            checksums.append(checksum_seconds(source, target))
        # What no later direction starts from makes room: three models at most are on the disk, copies among them.
        needed = {later.source for later in directions[index + 1 :]}
        for path in {source, target}:
            if path.name not in needed:
                shutil.rmtree(path)
        cost, result = min(runs, key=lambda run: run[0].cpu_seconds)
        copied, summed = (min(costs, key=lambda cost: cost.cpu_seconds) for costs in (copies, sums))
        with_sha256sum, with_hashlib = copied.cpu_seconds + summed.cpu_seconds, copied.cpu_seconds + min(checksums)
        yield {
            "from": direction.source,
            "to": direction.destination,
            "bytes": result["bytes_written"],
            "seconds": cost.seconds,
            "cpu_seconds": cost.cpu_seconds,
            "copy_cpu_seconds": copied.cpu_seconds,
            "sha256sum_cpu_seconds": summed.cpu_seconds,
            "hashlib_cpu_seconds": min(checksums),
            "tools_seconds": copied.seconds + summed.seconds,
            "cpu_ratio": cost.cpu_seconds / with_sha256sum,
            "cpu_ratio_with_hashlib": cost.cpu_seconds / with_hashlib,
            "bytes_per_cpu_second_without_checksums": result["bytes_written"] / (cost.cpu_seconds - min(checksums)),
            "peak_rss_bytes": max(result["peak_rss_bytes"] for _, result in runs),
        }


def dry_runs(directory: Path, model: Preset) -> dict[str, Any]:
    """Plan a model, in each format that needs one."""
    source = generate(directory / "largest", model, is_sparse=True)
    results = {}
    for options in DRY_RUNS:
        cost, result = convert(source, directory / "nowhere", (*options, "--dry-run"))
        found = {name: result[name] for name in ("bytes_written", "peak_rss_bytes")}
        results[options[1]] = {"seconds_with_start": cost.seconds, "cpu_seconds": cost.cpu_seconds, **found}
    return results


def limited(directory: Path, model: Preset) -> dict[str, dict[str, float]]:
    """What a conversion to ``tp`` takes under each limit of its memory."""
    source, results = generate(directory / "hub", model), {}
    for limit in LIMITS:
        options = ("--to", "tp", "--tp", "4", "--max-memory", limit, "--overwrite")
        cost, result = convert(source, directory / "tp", options)
        results[limit] = {"cpu_seconds": cost.cpu_seconds, "peak_rss_bytes": result["peak_rss_bytes"]}
    return results


COLUMNS = (
    *("from", "to", "GB", "s", "CPU s", "cp + sync + sha256sum: CPU s", "ratio", "with hashlib: CPU s", "ratio"),
    *("MB per CPU s, no checksums", "peak MB"),
)


def show(row: dict[str, Any]) -> None:
    """Print a row of the table that README.md has."""
    tools, own = (row["copy_cpu_seconds"] + row[f"{name}_cpu_seconds"] for name in ("sha256sum", "hashlib"))
    print(
        f"| {row['from']} | {row['to']} | {row['bytes'] / 1e9:.2f} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | "
        f"{tools:.1f} | {row['cpu_ratio']:.2f} | {own:.1f} | {row['cpu_ratio_with_hashlib']:.2f} | "
        f"{row['bytes_per_cpu_second_without_checksums'] / MEGA:.0f} | {row['peak_rss_bytes'] / MEGA:.0f} |",
        flush=True,
    )


def report_on(model: Preset, parent: Path | None, repetitions: int) -> dict[str, Any]:
    """All that is measured with one model."""
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    print(f"| {' | '.join(COLUMNS)} |\n| --- | --- |{' ---: |' * (len(COLUMNS) - 2)}")
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        for row in measure(model, Path(directory), repetitions):
            show(row)
            rows.append(row)
    here = {**environment("torch", "transformers"), "load_at_start": load}
    return {"environment": here, "directions": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and put what was measured into results/conversion.json."""
    parser = make_parser(__doc__, "quick")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's temporary directory")
    parser.add_argument("--repetitions", type=int, default=2)
    given, file = parse(parser, arguments, "conversion")
    results = read(file)  # of the models that are not measured now, what was measured before stays
    for name in given.models:
        if given.quick and name == "gpt2-2.5b":  # as tiny as the other one
            continue
        print(f"\n{name}\n")
        model = tiny(PRESETS[name]) if given.quick else PRESETS[name]
        results[name] = report_on(model, given.directory, given.repetitions)
    name = given.models[0]
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        limits = limited(Path(directory), tiny(PRESETS[name]) if given.quick else PRESETS[name])
    for limit, cost in limits.items():
        print(f"\n--max-memory {limit}: {cost['cpu_seconds']:.1f} CPU s, {cost['peak_rss_bytes'] / MEGA:.0f} MB")
    results[f"{name}, --max-memory"] = limits
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        planned = dry_runs(Path(directory), PRESETS[LARGEST])
    for name, dry in planned.items():
        print(f"\ndry run to {name}: {dry['seconds_with_start']:.1f} s, {dry['peak_rss_bytes'] / MEGA:.0f} MB")
    results[f"dry runs of {LARGEST}"] = planned
    write(file, results)


if __name__ == "__main__":
    main()
