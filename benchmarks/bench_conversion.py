"""How fast and in how much memory checkpoints are converted, next to a plain copy of the same files.

    python -m benchmarks.bench_conversion                      # GPT-2 355M and 2.5B: writes results/conversion.json
    python -m benchmarks.bench_conversion --models gpt2-355m   # the smaller one only; needs 5 GB of disk instead of 35
    python -m benchmarks.bench_conversion --quick              # a tiny one, to see that it runs

What is measured is told in README.md beside this file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import make_parser, parse
from benchmarks.records import environment, read, write
from hf_megatron.architectures import GPT2
from hf_megatron.checkpoint import itemsize, torch_dtype
from hf_megatron.partition import Box
from hf_megatron_conversion.files import Part, SafetensorsFile

MEGA = 10**6
CHUNK = 16 * 2**20
# Where the interpreter stands when the command has imported all that any conversion needs, and opened no file.
BASE = """
import re, hf_megatron.checkpoint, hf_megatron_conversion.converter, hf_megatron.commands.console, torch
from hf_megatron_conversion.formats import megatron_lm, hub, tp
from hf_megatron_conversion.formats.megatron_lm import writer
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


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
    is_safetensors: bool


DIRECTIONS = (
    Direction("hub", "hub in files of 2 GB", ("--to", "hub", "--max-shard-size", "2GB"), True),
    Direction("hub", "tp 4", ("--to", "tp", "--tp", "4"), True),
    Direction("tp 4", "tp 2", ("--to", "tp", "--tp", "2"), True),
    Direction("tp 4", "hub", ("--to", "hub"), True),
    Direction("hub", "megatron-lm 4", ("--to", "megatron-lm", "--tp", "4"), False),
    Direction("megatron-lm 4", "megatron-lm 2", ("--to", "megatron-lm", "--tp", "2"), False),
    Direction("megatron-lm 4", "hub", ("--to", "hub"), False),
)


@dataclass(frozen=True)
class Noise:
    """A tensor of random numbers: one block of them over and over."""

    dtype: str
    shape: tuple[int, ...]

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The part inside ``box``."""
        shape = self.shape if box is None else box.shape
        count = prod(shape)
        block = torch.randn(min(count, 2**20), generator=torch.Generator().manual_seed(count))
        return block.repeat(-(-count // max(len(block), 1)))[:count].view(shape).to(torch_dtype(self.dtype))


def generate(directory: Path, size: Size, *, is_sparse: bool = False) -> Path:
    """Write a stock checkpoint in float32; a sparse one takes no space, has all headers and holds zeros."""
    config = size.config()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = GPT2.tensors(config, GPT2.classes[0])
    parts = [Part(name, Noise("F32", tensor.shape), Box.whole(tensor.shape)) for name, tensor in tensors.items()]
    file = SafetensorsFile("model.safetensors", parts, {"format": "pt"})
    with (directory / file.path).open("wb") as stream:
        if is_sparse:
            stream.write(file._header)
            stream.truncate(file.nbytes)
        else:
            file.write(stream, lambda _: None)
            os.fsync(stream.fileno())
    return directory


def files_of(directory: Path) -> list[Path]:
    """All files in it."""
    return [path for path in directory.rglob("*") if path.is_file()]


def copy_seconds(source: Path, scratch: Path) -> float:
    """Seconds that a plain copy of all files takes until it is on disk, as a conversion's result is."""
    started = time.perf_counter()
    for index, path in enumerate(files_of(source)):
        with path.open("rb") as original, (scratch / str(index)).open("xb") as copy:
            while chunk := original.read(CHUNK):
                copy.write(chunk)
            copy.flush()
            os.fsync(copy.fileno())
    seconds = time.perf_counter() - started
    for path in scratch.iterdir():
        path.unlink()
    return seconds


def convert(source: Path, destination: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """What the command reports of a conversion in a process of its own."""
    command = [sys.executable, "-m", "hf_megatron_conversion", "convert", str(source), str(destination), *options]
    done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def base_bytes() -> int:
    """Peak resident memory before a file is opened."""
    done = subprocess.run([sys.executable, "-c", BASE], check=True, capture_output=True, text=True)
    return int(done.stdout) * 1024


def measure(size: Size, directory: Path, base: int, repetitions: int) -> Iterator[dict[str, Any]]:
    """Every direction, each next to a copy of its source; the fastest of the repetitions of both."""
    generate(directory / "hub", size)
    (directory / "scratch").mkdir()
    largest = max(prod(t.shape) for t in GPT2.tensors(size.config(), GPT2.classes[0]).values()) * itemsize("F32")
    for index, direction in enumerate(DIRECTIONS):
        source = directory / direction.source
        # What comes back to "hub" must not replace the model that everything starts from.
        target = directory / ("hub again" if direction.destination == "hub" else direction.destination)
        copies, runs = [], []
        for _ in range(repetitions):
            shutil.rmtree(target, ignore_errors=True)
            copies.append(copy_seconds(source, directory / "scratch"))
            runs.append(convert(source, target, direction.options))
        copied = sum(path.stat().st_size for path in files_of(source))
        # What no later direction starts from makes room: three models at most are on the disk, copies among them.
        needed = {later.source for later in DIRECTIONS[index + 1 :]}
        for path in {source, target}:
            if path.name not in needed:
                shutil.rmtree(path)
        run = min(runs, key=lambda run: run["seconds"])
        num_bytes = run["bytes_written"]
        speed, copy_speed = num_bytes / run["seconds"], copied / min(copies)
        peak = max(run["peak_rss_bytes"] for run in runs)
        yield {
            "from": direction.source,
            "to": direction.destination,
            "bytes": num_bytes,
            "seconds": run["seconds"],
            "bytes_per_second": speed,
            "copy_bytes_per_second": copy_speed,
            "share_of_copy": speed / copy_speed,
            "is_safetensors": direction.is_safetensors,
            "peak_rss_bytes": peak,
            "beyond_base_and_largest_tensor_bytes": max(0, peak - base - largest),
        }


def dry_run(directory: Path) -> dict[str, Any]:
    """Plan the largest model of the paper."""
    source = generate(directory / "largest", LARGEST, is_sparse=True)
    started = time.perf_counter()
    result = convert(source, directory / "nowhere", ("--to", "megatron-lm", "--tp", "8", "--dry-run"))
    return {"seconds_with_start": time.perf_counter() - started, "bytes": result["bytes_written"]}


def show(row: dict[str, Any]) -> None:
    """Print a row of the table that README.md has."""
    speeds = f"{row['bytes_per_second'] / MEGA:.0f} | {row['copy_bytes_per_second'] / MEGA:.0f}"
    print(
        f"| {row['from']} | {row['to']} | {row['bytes'] / 1e9:.2f} | {row['seconds']:.1f} | {speeds} | "
        f"{row['share_of_copy']:.2f} | {row['peak_rss_bytes'] / MEGA:.0f} |",
        flush=True,
    )


def report_on(size: Size, parent: Path | None, repetitions: int) -> dict[str, Any]:
    """All that is measured with one model."""
    load, base = os.getloadavg()[0], base_bytes()
    rows: list[dict[str, Any]] = []
    print("| from | to | GB | s | MB/s | copy MB/s | share of copy | peak MB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        for row in measure(size, Path(directory), base, repetitions):
            show(row)
            rows.append(row)
    print(f"\nbefore a file is opened: {base / MEGA:.0f} MB")
    here = {**environment("torch", "transformers"), "load_at_start": load}
    return {"environment": here, "base_rss_bytes": base, "directions": rows}


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
    print(f"dry run of 8.3B: {results['dry run of gpt2-8.3b']['seconds_with_start']:.1f} s")
    write(file, results)


if __name__ == "__main__":
    main()
