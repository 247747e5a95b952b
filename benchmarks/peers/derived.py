"""What follows from the raw samples of a workload: spreads, ratios, peaks, utilisation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks.peers.competitors import Configuration
from benchmarks.peers.rounds import Spread, clean, paired_ratios
from benchmarks.peers.workload import Workload, training_flops

__all__ = ["CARD", "Result", "pairs", "peak_of", "ratio_of", "spread_of"]

Result = Mapping[str, Any]  # of one workload, as bench_training_step.py writes it
CARD = "the card"  # in the place of a peer: a step that does nothing but the model's operations at the card's peak
# Dense bf16 peaks in operations per second, from the makers' data sheets, by a part of the name that torch reports.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def spread_of(result: Result, name: str, figure: str = "step") -> Spread | None:
    """The undisturbed samples of a configuration; None if there is none."""
    samples = clean(result["configurations"][name]["samples"], result["max_foreign_cores"])
    return Spread.of([sample[figure] for sample in samples])


def peak_of(result: Result, name: str, kind: str = "resident") -> float:
    """Most bytes during forward and backward on the rank that needs most; the median of several measurements."""
    taken = result["configurations"][name]["memory"]
    return float(statistics.median(max(rank["peak"][kind] for rank in ranks) for ranks in taken))


def ratio_of(result: Result, ours: str, peer: str, figure: str = "step") -> Spread | None:
    """The ratio of ours to a peer; None if one of them was not measured.

    Args:
        result: Of one workload.
        ours: Configuration of the numerator.
        peer: Configuration of the denominator, or :data:`CARD`.
        figure: A time of the samples, whose ratios are taken round by round; or ``resident`` or ``allocated``, peak
            memory, of which there is one ratio.
    """
    configurations = result["configurations"]
    if ours not in configurations or (peer not in configurations and peer != CARD):
        return None
    if peer == CARD:
        peak = next((peak for part, peak in _PEAKS.items() if part in result["environment"]["device"]), None)
        samples = clean(configurations[ours]["samples"], result["max_foreign_cores"])
        operations = training_flops(Workload(**result["workload"]))
        return None if peak is None else Spread.of([sample["step"] * peak / operations for sample in samples])
    if figure in ("resident", "allocated"):
        return Spread.of([peak_of(result, ours, figure) / peak_of(result, peer, figure)])
    own, other = (configurations[name]["samples"] for name in (ours, peer))
    return Spread.of(paired_ratios(own, other, figure, result["max_foreign_cores"]))


def pairs(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What is worth comparing: ours with every peer in the same layout, and with itself in simpler ones."""
    configurations = [Configuration.parse(name) for name in names]
    for own in configurations:
        for other in configurations:
            if own == other or not own.competitor.startswith("ours"):
                continue
            is_same_layout = (own.ranks, own.threads) == (other.ranks, other.threads)
            is_peer = not other.competitor.startswith("ours") or other.competitor == "ours"
            is_less_parallel = own.competitor == other.competitor and other.ranks < own.ranks
            if (is_same_layout and is_peer) or is_less_parallel:
                yield own.name, other.name
