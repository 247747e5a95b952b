"""Greedy decoding with a cache of keys and values at TP=2: tokens per second of ours and of transformers' own TP.

    python -m benchmarks.bench_decoding            # writes results/decoding.{json,md}
    python -m benchmarks.bench_decoding --quick    # tiny models, to see that it runs

What is measured, and why the two do not run the same model, is told in README.md beside this file. Needs Linux.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.agreement import DifferentWorkError
from benchmarks.peers.competitors import Configuration
from benchmarks.peers.fleet import Workers
from benchmarks.peers.rounds import MAX_FOREIGN_CORES, Spread, clean, paired_ratios, take_rounds
from benchmarks.peers.tables import machine, quartiles, table
from benchmarks.peers.worker import Job
from benchmarks.peers.workload import Workload, generate
from benchmarks.records import RESULTS, environment, read, write

OURS, PEER = "gpt2 ours-tp2-1t", "llama transformers-tp-tp2-1t"
LABELS = (OURS, PEER, "gpt2 ours-tp1-2t", "gpt2 stock-sdpa-tp1-2t", "llama stock-sdpa-tp1-2t")
HEAD = ("configuration", "tokens/s", "quartiles", "clean samples")
TARGET = 1.3  # times the peer's tokens per second


def measure(
    workloads: Mapping[str, Workload],
    new_tokens: int,
    rounds: int,
    max_foreign_cores: float,
    labels: Sequence[str] = LABELS,
    device: str = "cpu",
) -> dict[str, Any]:
    """Decode with every configuration in turns.

    Args:
        workloads: By model; the prompt is what the sequence leaves beside the new tokens.
        new_tokens: How many to decode for each sequence of the batch.
        rounds: Samples of each configuration.
        max_foreign_cores: Processor time of others at which a sample is dropped.
        labels: Models and configurations.
        device: ``cpu`` or ``cuda``.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        checkpoints = {model: generate(workload, scratch / model) for model, workload in workloads.items()}
        fleet: list[Workers] = []
        for label in labels:
            model, _, configuration = label.partition(" ")
            job = Job(Configuration.parse(configuration), workloads[model], str(checkpoints[model]), device)
            fleet.append(stack.enter_context(Workers(job, scratch, name=label)))
        command = f"generate {new_tokens}"
        first: dict[str, list[Any]] = {}
        versions: dict[str, str] = {}
        for workers in fleet:
            versions = workers.hello()[0]["versions"]
            workers.ask("load")
            first[workers.name] = [reply["tokens"] for reply in workers.ask(command)]
        if all(workload.dtype == "float32" for workload in workloads.values()):  # else a near tie may go either way
            check_same_tokens(first)
        samples = take_rounds(fleet, rounds, command, "seconds", max_foreign_cores=max_foreign_cores)
    return {
        "workloads": {model: asdict(workload) for model, workload in workloads.items()},
        "new_tokens": new_tokens,
        "environment": {**environment(), "versions": versions},
        "max_foreign_cores": max_foreign_cores,
        "samples": samples,
    }


def check_same_tokens(found: Mapping[str, Sequence[Any]]) -> None:
    """Compare what every rank of every configuration of a model decoded.

    Raises:
        DifferentWorkError: Two of them are not equal.
    """
    first: dict[str, tuple[str, Any]] = {}
    for label, by_rank in found.items():
        for tokens in by_rank:
            other, expected = first.setdefault(label.partition(" ")[0], (label, tokens))
            if tokens != expected:
                raise DifferentWorkError(f"{label} and {other} decoded different tokens from the same weights.")


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each dtype, and the target."""
    parts = []
    for dtype, result in results.items():
        workload = Workload(**result["workloads"]["gpt2"])
        parts.append(
            f"### {dtype}\n\n{workload.layers} layers, hidden {workload.hidden}, {workload.heads} heads, vocabulary "
            f"{workload.vocab}; {result['new_tokens']} tokens after {workload.sequence - result['new_tokens']}, batch "
            f"{workload.batch}. {machine(result['environment'])}"
        )
        parts.append(table(HEAD, rows(result)))
        allowed = result["max_foreign_cores"]
        ratio = Spread.of(
            [1 / r for r in paired_ratios(result["samples"][OURS], result["samples"][PEER], "seconds", allowed)]
        )
        if ratio is not None:
            is_met = "met" if ratio.median >= TARGET else "not met"
            parts.append(
                f"{OURS} / {PEER}: {ratio.median:.2f} times the tokens per second, quartiles {quartiles(ratio, 2)}, "
                f"{ratio.count} rounds; target {TARGET}: {is_met}."
            )
    return "\n\n".join(parts) + "\n"


def rows(result: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Of each configuration the tokens per second, quartiles, and how many samples nobody disturbed."""
    batch = result["workloads"]["gpt2"]["batch"]
    for label, samples in result["samples"].items():
        undisturbed = clean(samples, result["max_foreign_cores"])
        spread = Spread.of([batch * result["new_tokens"] / sample["seconds"] for sample in undisturbed])
        speed = ["", ""] if spread is None else [f"{spread.median:.1f}", quartiles(spread, 1)]
        yield label, *speed, f"{len(undisturbed)} of {len(samples)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--max-foreign-cores", type=float, default=MAX_FOREIGN_CORES)
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory to write to")
    parser.add_argument("--quick", action="store_true", help="tiny models and two rounds, to see that it runs")
    given = parser.parse_args(arguments)
    shape, new_tokens = Workload("gpt2", sequence=96), 64
    if given.quick:
        shape, new_tokens = Workload("gpt2", 2, 32, 4, vocab=128, sequence=8), 4
        given.dtypes, given.rounds, given.max_foreign_cores = ["float32"], 2, float("inf")
        if given.output == RESULTS:
            given.output = Path(tempfile.mkdtemp())
    file = given.output / "decoding.json"
    results = read(file)
    for dtype in given.dtypes:
        workloads = {model: replace(shape, model=model, dtype=dtype) for model in ("gpt2", "llama")}
        results[dtype] = measure(workloads, new_tokens, given.rounds, given.max_foreign_cores)
        write(file, results)
    print(f"\n{markdown(results)}")
    file.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
