"""How fast and in how much memory checkpoints are converted, next to ``cp``, ``sha256sum`` and ``sync``.

    python -m benchmarks.bench_conversion                      # GPT-2 355M and 2.5B: writes results/conversion.json
    python -m benchmarks.bench_conversion --models gpt2-355m   # the smaller one only; needs 5 GB of disk instead of 35
    python -m benchmarks.bench_conversion --quick              # a tiny one, to see that it runs

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import make_parser, parse
from benchmarks.records import environment, read, write
from hf_megatron.architectures import GPT2
from hf_megatron.checkpoint import itemsize

MEGA = 10**6
CHUNK = 2**20


@dataclass(frozen=True)
class Size:
    """A GPT-2 of the paper."""

    layers: int
    hidden: int
    heads: int
    vocab: int = 50257
    positions: int = 1024

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": self.vocab,
            "n_positions": self.positions,
            "n_embd": self.hidden,
            "n_layer": self.layers,
            "n_head": self.heads,
            "bos_token_id": self.vocab - 1,
            "eos_token_id": self.vocab - 1,
        }


SIZES = {"gpt2-355m": Size(24, 1024, 16), "gpt2-2.5b": Size(54, 1920, 20)}
QUICK = {"tiny": Size(2, 64, 4, vocab=503, positions=32)}
LARGEST = Size(72, 3072, 24)  # 8.3B, for the dry run


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
)


def generate(directory: Path, size: Size, *, is_sparse: bool = False) -> Path:
    """Write a stock checkpoint in float32; a sparse one takes no space, has all headers and holds zeros."""
    config = size.config()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in GPT2.tensors(config, GPT2.classes[0]).items():
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


def reference(source: Path, result: Path, scratch: Path) -> Cost:
    """A copy of the source, checksums of source and result, and all of it on the disk, with the system's tools."""
    commands: list[list[object]] = [
        ["cp", "-r", source, scratch],
        ["sync"],
        ["sha256sum", *files_of(source), *files_of(result)],
    ]
    costs = [run(command)[0] for command in commands]
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
                crc = zlib.crc32(chunk, crc) if path.suffix == ".pt" else 0
    return time.process_time() - started


def convert(source: Path, destination: Path, options: tuple[str, ...]) -> tuple[Cost, dict[str, Any]]:
    """A conversion in a process of its own: what it cost, and what the command reports."""
    cost, out = run([sys.executable, "-m", "hf_megatron", "convert", source, destination, *options, "--json"])
    result: dict[str, Any] = json.loads(out)
    return cost, result


def measure(size: Size, directory: Path, repetitions: int) -> Iterator[dict[str, Any]]:
    """Every direction, each next to the system's tools; of both the run with the least processor time."""
    generate(directory / "hub", size)
    for index, direction in enumerate(DIRECTIONS):
        source = directory / direction.source
        # What comes back to "hub" must not replace the model that everything starts from.
        target = directory / ("hub again" if direction.destination == "hub" else direction.destination)
        references, runs, checksums = [], [], []
        for _ in range(repetitions):
            shutil.rmtree(target, ignore_errors=True)
            runs.append(convert(source, target, direction.options))
            references.append(reference(source, target, directory / "scratch"))
            checksums.append(checksum_seconds(source, target))
        # What no later direction starts from makes room: three models at most are on the disk, copies among them.
        needed = {later.source for later in DIRECTIONS[index + 1 :]}
        for path in {source, target}:
            if path.name not in needed:
                shutil.rmtree(path)
        cost, result = min(runs, key=lambda run: run[0].cpu_seconds)
        tools = min(references, key=lambda cost: cost.cpu_seconds)
        yield {
            "from": direction.source,
            "to": direction.destination,
            "bytes": result["bytes_written"],
            "seconds": cost.seconds,
            "cpu_seconds": cost.cpu_seconds,
            "tools_seconds": tools.seconds,
            "tools_cpu_seconds": tools.cpu_seconds,
            "cpu_ratio": cost.cpu_seconds / tools.cpu_seconds,
            "bytes_per_cpu_second_without_checksums": result["bytes_written"] / (cost.cpu_seconds - min(checksums)),
            "peak_rss_bytes": max(result["peak_rss_bytes"] for _, result in runs),
        }


def dry_run(directory: Path) -> dict[str, Any]:
    """Plan the largest model of the paper."""
    source = generate(directory / "largest", LARGEST, is_sparse=True)
    cost, result = convert(source, directory / "nowhere", ("--to", "megatron-lm", "--tp", "8", "--dry-run"))
    found = {name: result[name] for name in ("bytes_written", "peak_rss_bytes")}
    return {"seconds_with_start": cost.seconds, "cpu_seconds": cost.cpu_seconds, **found}


def show(row: dict[str, Any]) -> None:
    """Print a row of the table that README.md has."""
    print(
        f"| {row['from']} | {row['to']} | {row['bytes'] / 1e9:.2f} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | "
        f"{row['tools_cpu_seconds']:.1f} | {row['cpu_ratio']:.2f} | "
        f"{row['bytes_per_cpu_second_without_checksums'] / MEGA:.0f} | {row['peak_rss_bytes'] / MEGA:.0f} |",
        flush=True,
    )


def report_on(size: Size, parent: Path | None, repetitions: int) -> dict[str, Any]:
    """All that is measured with one model."""
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    print(
        "| from | to | GB | s | CPU s | cp + sha256sum + sync: CPU s | ratio | MB per CPU s, no checksums | peak MB |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        for row in measure(size, Path(directory), repetitions):
            show(row)
            rows.append(row)
    here = {**environment("torch", "transformers"), "load_at_start": load}
    return {"environment": here, "directions": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and put what was measured into results/conversion.json."""
    parser = make_parser(__doc__, "quick")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's temporary directory")
    parser.add_argument("--repetitions", type=int, default=2)
    given, file = parse(parser, arguments, "conversion")
    sizes: Mapping[str, Size] = QUICK if given.quick else {name: SIZES[name] for name in given.models}
    results = read(file)  # of the models that are not measured now, what was measured before stays
    for name, size in sizes.items():
        print(f"\n{name}\n")
        results[name] = report_on(size, given.directory, given.repetitions)
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        results["dry run of gpt2-8.3b"] = dry_run(Path(directory))
    dry = results["dry run of gpt2-8.3b"]
    print(f"\ndry run of 8.3B: {dry['seconds_with_start']:.1f} s, {dry['peak_rss_bytes'] / MEGA:.0f} MB")
    write(file, results)


if __name__ == "__main__":
    main()
