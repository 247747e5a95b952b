"""What data cost that do not fit in memory: time to open, memory of a rank, and the rate at which two ranks read.

    python -m benchmarks.bench_data            # 2 billion tokens, 4 GB for a while; writes results/data.json
    python -m benchmarks.bench_data --quick    # 2 million tokens, to see that it runs

Tokens are random, in documents of 1,000. The file is opened when nothing of it is in the system's cache. Two processes
read it as tensor-parallel ranks do: each of them all sequences of 128 tokens, in random order, in batches of 16. The
rate is the slower one's. Beside it stands the rate of ``examples/pretrain_gpt2.py`` on two ranks at its own small
sizes, on the same file. Memory is what is the process's alone, over what it is after all imports.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.multiprocessing as mp
from torch.utils.data import DataLoader
from transformers import GPT2TokenizerFast

from benchmarks import records
from benchmarks.command_line import make_parser, parse
from hf_megatron.paper.data import open_token_files
from hf_megatron.paper.data.token_files import write_index

NAME = "data"
ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, DOCUMENT, LENGTH, BATCH = 4096, 1000, 128, 16
TARGETS = {"open_seconds": 1.0, "private_bytes": 50e6, "times_the_example": 20.0}


def make_tokens(directory: Path, tokens: int) -> None:
    """Write token files of random documents, and a tokenizer of as many tokens for the example."""
    generator, dtype = np.random.default_rng(0), np.dtype("<u2")
    with (directory / "tokens.bin").open("wb") as file:
        for start in range(0, tokens, 10_000 * DOCUMENT):
            count = min(10_000 * DOCUMENT, tokens - start)
            part = generator.integers(1, VOCABULARY, count, dtype=np.uint16)
            part[DOCUMENT - 1 :: DOCUMENT] = 0
            file.write(part.astype(dtype).tobytes())
        os.fsync(file.fileno())
    np.full(tokens // DOCUMENT, DOCUMENT, "<i4").tofile(directory / "lengths")
    write_index(directory / "tokens.idx", directory / "lengths", dtype)
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    GPT2TokenizerFast(vocab=words, merges=[]).save_pretrained(directory)
    for name in ("tokens.bin", "tokens.idx"):
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def private_bytes() -> int:
    """Memory that no other process shares."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    return 1024 * sum(int(number) for number in re.findall(r"^Private_\w+: +(\d+) kB", text, re.M))


def _read(rank: int, directory: str, seconds: float) -> None:
    before, began = private_bytes(), time.perf_counter()
    packing = {"length": LENGTH, "end_of_document": 0, "vocab_size": VOCABULARY}
    data = open_token_files([directory], seed=0, multiple_of=BATCH, **packing)
    opened = time.perf_counter() - began
    batches = iter(DataLoader(data, batch_size=BATCH))
    next(batches)
    found: dict[str, Any] = {"open_seconds": opened, "first_batch_seconds": time.perf_counter() - began - opened}
    found["private_bytes"] = private_bytes() - before
    began, tokens = time.perf_counter(), 0
    for batch in batches:
        tokens += batch["input_ids"].numel()
        if time.perf_counter() - began > seconds:
            break
    found["tokens_per_second"] = tokens / (time.perf_counter() - began)
    found["private_bytes_at_the_end"] = private_bytes() - before
    (Path(directory) / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def example_rate(directory: Path, steps: int) -> float:
    """Tokens that the example trains on in a second, on two ranks."""
    script = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(ROOT / "examples/pretrain_gpt2.py"),
    ]
    options = [f"--output={directory / 'model'}", f"--steps={steps}", f"--length={LENGTH}", f"--batch={BATCH}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}"}
    command = [sys.executable, *script, *options, "--data", str(directory)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    rates = re.findall(r"'train_samples_per_second': '?([\d.]+)", done.stdout)
    return float(rates[-1]) * LENGTH


def measure(tokens: int, seconds: float, steps: int) -> dict[str, Any]:
    """Make the file, read it on two ranks, train on it, and delete it."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_tokens(directory, tokens)
        mp.spawn(_read, (name, seconds), nprocs=2)
        ranks = [json.loads((directory / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
        size = (directory / "tokens.bin").stat().st_size
        rate = example_rate(directory, steps)
    slowest = min(rank["tokens_per_second"] for rank in ranks)
    result = {"tokens": tokens, "bytes": size, "length": LENGTH, "batch": BATCH, "ranks": ranks}
    return {**result, "example_tokens_per_second": rate, "times_the_example": slowest / rate, "targets": TARGETS}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    given, file = parse(make_parser(__doc__, "quick"), arguments, NAME)
    result = measure(2_000_000, 1, 10) if given.quick else measure(2_000_000_000, 20, 200)
    records.write(file, {"environment": records.environment("torch", "transformers"), **result})
    worst = max(rank["open_seconds"] + rank["first_batch_seconds"] for rank in result["ranks"])
    memory = max(rank["private_bytes"] for rank in result["ranks"]) / 1e6
    print(
        f"{file}: {result['tokens']:,} tokens; first batch after {worst:.3f} s and {memory:.1f} MB; "
        f"{result['times_the_example']:.0f} times the example's {result['example_tokens_per_second']:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
