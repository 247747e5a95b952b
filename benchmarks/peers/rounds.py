"""Samples in turns, their spread, and ratios between configurations.

A sample is dropped if others kept the machine busy meanwhile. It is taken again a few times, so that a short
disturbance costs time and no data. Two configurations are compared round by round, so that what changes slowly cancels
out.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.fleet import Workers

__all__ = ["ATTEMPTS", "MAX_FOREIGN_CORES", "Spread", "clean", "paired_ratios", "sample", "take_rounds"]

MAX_FOREIGN_CORES = 0.15  # of processor time taken by others, on average over a sample; more, and it is dropped
ATTEMPTS = 3  # to get a sample that is not
_QUIET_SECONDS = 5.0  # at most, to wait for others between attempts

Sample = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """The middle of several numbers and how far they lie apart.

    Attributes:
        median: Half of them are smaller.
        low: A quarter of them is smaller.
        high: A quarter of them is larger.
        count: How many there are.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread | None:
        """Their spread; None of no numbers."""
        if not numbers:
            return None
        low, median, high = (
            statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else [numbers[0]] * 3
        )
        return cls(median, low, high, len(numbers))


def sample(workers: Workers, command: str, max_foreign_cores: float = MAX_FOREIGN_CORES) -> Sample:
    """Let all ranks do something once.

    Returns:
        Every number of their replies, of the rank for which it is largest: what takes time is over when the slowest is
        done. And ``foreign``, the cores that were busy with anything else meanwhile; ``waited``, the seconds that
        threads of these ranks were ready to run and had no core, which some do in a quiet machine too.
    """
    for _ in range(ATTEMPTS):
        load, waited = workers.foreign_load(), workers.waited_seconds()
        replies = workers.ask(command)
        foreign, waited = load.cores(), workers.waited_seconds() - waited
        if foreign <= max_foreign_cores:
            break
        _wait_for_quiet(workers, max_foreign_cores)
    numbers = {name for name, value in replies[0].items() if isinstance(value, int | float)}
    return {**{name: max(reply[name] for reply in replies) for name in numbers}, "foreign": foreign, "waited": waited}


def _wait_for_quiet(workers: Workers, max_foreign_cores: float) -> None:
    deadline = time.monotonic() + _QUIET_SECONDS
    while time.monotonic() < deadline:
        load = workers.foreign_load()
        time.sleep(0.3)
        if load.cores() <= max_foreign_cores:
            return


def take_rounds(
    fleet: Sequence[Workers],
    rounds: int,
    command: str = "step",
    figure: str = "step",
    *,
    max_foreign_cores: float = MAX_FOREIGN_CORES,
    max_seconds: float = float("inf"),
    tell: Callable[[str], None] = print,
) -> dict[str, list[Sample]]:
    """A sample of each configuration in every round, in an order that changes from round to round.

    Args:
        fleet: The configurations' workers.
        rounds: How many rounds.
        command: What a sample is.
        figure: Which of its numbers to tell, in seconds.
        max_foreign_cores: What others may use of the machine.
        max_seconds: No round is begun after this time.
        tell: Is told how far it has got.

    Returns:
        By configuration the samples, one a round, the dropped ones too.
    """
    order, shuffle, started = list(fleet), random.Random(0).shuffle, time.monotonic()
    samples: dict[str, list[Sample]] = {workers.name: [] for workers in fleet}
    for index in range(rounds):
        if time.monotonic() - started > max_seconds:
            tell(f"stopped after {index} of {rounds} rounds: {max_seconds:.0f} s are over")
            break
        shuffle(order)
        for workers in order:
            samples[workers.name].append(sample(workers, command, max_foreign_cores))
        seconds = ", ".join(f"{w.name} {samples[w.name][-1][figure]:.3f}" for w in fleet)
        tell(f"round {index + 1}: {seconds} s")
    return samples


def clean(samples: Sequence[Sample], max_foreign_cores: float = MAX_FOREIGN_CORES) -> list[Sample]:
    """Those that nobody disturbed."""
    return [sample for sample in samples if sample["foreign"] <= max_foreign_cores]


def paired_ratios(
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    figure: str = "step",
    max_foreign_cores: float = MAX_FOREIGN_CORES,
) -> list[float]:
    """Ours over theirs, for each round in which both samples are undisturbed."""
    return [
        a[figure] / b[figure]
        for a, b in zip(ours, theirs, strict=True)
        if max(a["foreign"], b["foreign"]) <= max_foreign_cores
    ]
