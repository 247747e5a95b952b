"""What was measured, as tables in Markdown and as a figure. Everything here is computed from the raw samples."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.competitors import Configuration
from benchmarks.peers.rounds import Spread, clean, paired_ratios
from benchmarks.peers.workload import Workload, training_flops

__all__ = ["TARGETS", "Target", "draw", "markdown", "pairs", "ratio_of", "target_rows"]

Result = Mapping[str, Any]  # of one workload
MEGA = 1e6
# Dense bf16 peaks in operations per second, from the makers' data sheets, by a part of the name that torch reports.
_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


@dataclass(frozen=True)
class Target:
    """A ratio of ours to a peer that is aimed at.

    Args:
        work: What is compared.
        workload: The workload it is measured with.
        ours: Configuration of the numerator.
        peer: Configuration of the denominator.
        at_most: The ratio aimed at.
        figure: ``step``, the seconds of forward and backward, or ``resident``, peak memory per rank.
    """

    work: str
    workload: str
    ours: str
    peer: str
    at_most: float
    figure: str = "step"


_TP2, _TWO_THREADS = "ours-tp2-1t", "ours-tp1-2t"
TARGETS = (
    Target("GPT-2 step TP=2 to megatron-core, bf16", "gpt2-bf16", _TP2, "megatron-core-tp2-1t", 0.92),
    Target("GPT-2 step TP=2 to megatron-core, fp32", "gpt2-fp32", _TP2, "megatron-core-tp2-1t", 1.00),
    Target("GPT-2 step TP=2 to DTensor with loss_parallel, fp32", "gpt2-fp32", _TP2, "dtensor-tp2-1t", 0.60),
    Target("GPT-2 step TP=2 to DTensor with loss_parallel, bf16", "gpt2-bf16", _TP2, "dtensor-tp2-1t", 0.60),
    Target("BERT step TP=2 to megatron-core, fp32", "bert-fp32", _TP2, "megatron-core-tp2-1t", 0.75),
    Target("BERT step TP=2 to transformers' TP, fp32", "bert-fp32", _TP2, "transformers-tp-tp2-1t", 0.65),
    Target("GPT-2 TP=2 (2 x 1 thread) to TP=1 (2 threads), fp32", "gpt2-fp32", _TP2, _TWO_THREADS, 1.00),
    Target("BERT TP=2 (2 x 1 thread) to TP=1 (2 threads), fp32", "bert-fp32", _TP2, _TWO_THREADS, 1.00),
    Target("GPT-2 TP=1 to stock transformers, 2 threads, fp32", "gpt2-fp32", _TWO_THREADS, "stock-sdpa-tp1-2t", 0.90),
    Target("BERT TP=1 to stock transformers, 2 threads, fp32", "bert-fp32", _TWO_THREADS, "stock-eager-tp1-2t", 0.90),
    Target(
        "GPT-2 peak memory per rank, TP=2, to megatron-core, fp32",
        "gpt2-fp32",
        _TP2,
        "megatron-core-tp2-1t",
        0.65,
        "resident",
    ),
    *(
        Target(
            f"{name} on a GPU to stock with sdpa and torch.compile", name, "ours-tp1-1t", "stock-compiled-tp1-1t", 0.8
        )
        for name in ("gpt2-355m", "gpt2-1.2b", "gpt2-2.5b")
    ),
)


def pairs(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What is compared: ours with each other competitor on as many ranks, and ours with itself on one rank."""
    configurations = [Configuration.parse(name) for name in names]
    ours = [c for c in configurations if c.competitor.startswith("ours")]
    for own in ours:
        for other in configurations:
            is_peer = other not in ours and other.ranks == own.ranks
            is_less_parallel = other.competitor == own.competitor and other.ranks < own.ranks
            is_variant = other.competitor == "ours" and own.competitor != "ours" and other.ranks == own.ranks
            if (is_peer and other.threads == own.threads) or is_less_parallel or is_variant:
                yield own.name, other.name


def ratio_of(result: Result, ours: str, peer: str, figure: str = "step") -> Spread | None:
    """The ratio ours / peer; of a time over the rounds, of memory of the two medians."""
    both = [result["configurations"].get(name) for name in (ours, peer)]
    if None in both:
        return None
    if figure in ("resident", "allocated"):
        own, other = (_peak(configuration, figure) for configuration in both)
        return Spread.of([own / other])
    own, other = (configuration["samples"] for configuration in both)
    return Spread.of(paired_ratios(own, other, figure, result["max_foreign_cores"]))


def _peak(configuration: Mapping[str, Any], kind: str = "resident") -> float:
    """Bytes at the most, on the rank that needs most; the median of several measurements."""
    return float(statistics.median(max(rank["peak"][kind] for rank in taken) for taken in configuration["memory"]))


def _step(result: Result, name: str, figure: str = "step") -> Spread | None:
    samples = clean(result["configurations"][name]["samples"], result["max_foreign_cores"])
    return Spread.of([sample[figure] for sample in samples])


def target_rows(results: Mapping[str, Result]) -> Iterator[tuple[Target, Spread, bool]]:
    """Each target of which both sides were measured, the ratio, and whether the median meets it."""
    for target in TARGETS:
        if target.workload in results:
            ratio = ratio_of(results[target.workload], target.ours, target.peer, target.figure)
            if ratio is not None:
                yield target, ratio, ratio.median <= target.at_most


# ---------------------------------------------------------------------- tables


def markdown(results: Mapping[str, Result]) -> str:
    """All tables."""
    parts = [_table(("work", "target", "ours / peer", "quartiles", "rounds", "met"), _target_cells(results))]
    for name, result in results.items():
        parts += [f"### {name}", _caption(result), _configuration_table(result), _ratio_table(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _target_cells(results: Mapping[str, Result]) -> Iterator[Sequence[str]]:
    for target, ratio, is_met in target_rows(results):
        quartiles = f"{ratio.low:.3f} to {ratio.high:.3f}" if ratio.count > 1 else ""
        count = str(ratio.count) if ratio.count > 1 else ""
        yield target.work, f"{target.at_most:.2f}", f"{ratio.median:.3f}", quartiles, count, "yes" if is_met else "no"


def _caption(result: Result) -> str:
    workload, environment = Workload(**result["workload"]), result["environment"]
    return (
        f"{workload.layers} layers, hidden {workload.hidden}, {workload.heads} heads, vocabulary {workload.vocab}, "
        f"{workload.batch} x {workload.sequence} tokens, {workload.dtype}. {environment['device']}, "
        f"{environment['cores']} cores; {', '.join(f'{k} {v}' for k, v in environment['versions'].items())}."
    )


def _configuration_table(result: Result) -> str:
    has_card = any("allocated" in c["memory"][0][0]["peak"] for c in result["configurations"].values())
    head = ["configuration", "step ms", "quartiles", "forward", "backward", "AdamW", "tokens/s", "peak MB"]
    head += ["GPU peak MB", "MFU"] if has_card else []
    head += ["beyond weights and gradients", "collectives", "MB sent", "clean"]
    return _table(head, (_configuration_cells(result, name, has_card) for name in result["configurations"]))


def _configuration_cells(result: Result, name: str, has_card: bool) -> Sequence[str]:
    configuration, workload = result["configurations"][name], Workload(**result["workload"])
    step, forward, backward = (_step(result, name, figure) for figure in ("step", "forward", "backward"))
    if step is None or forward is None or backward is None:
        times = ["no clean sample", "", "", ""]
    else:
        times = [_ms(step.median), f"{_ms(step.low)} to {_ms(step.high)}", _ms(forward.median), _ms(backward.median)]
    optimizer = max(statistics.median(rank["seconds"]) for rank in configuration["optimizer"])
    speed = "" if step is None else f"{workload.tokens / step.median:.0f}"
    kind = "allocated" if has_card else "resident"
    ranks = configuration["memory"][0]
    weights = ranks[0]["weights"]
    beyond = _peak(configuration, kind) - 2 * weights - (0 if has_card else ranks[0]["before"] - weights)
    sent = [configuration["communication"][0][direction] for direction in ("forward", "backward")]
    card = []
    if has_card:
        card = [f"{_peak(configuration, 'allocated') / MEGA:.0f}", _utilisation(result, step)]
    return [
        name,
        *times,
        _ms(optimizer),
        speed,
        f"{_peak(configuration) / MEGA:.0f}",
        *card,
        f"{beyond / MEGA:.0f}",
        " + ".join(str(sum(way["count"].values())) for way in sent),
        " + ".join(f"{sum(way['bytes'].values()) / MEGA:.1f}" for way in sent),
        f"{step.count if step else 0}/{len(configuration['samples'])}",
    ]


def _utilisation(result: Result, step: Spread | None) -> str:
    """Share of the card's dense bf16 peak that the model's operations take."""
    peak = next((peak for part, peak in _PEAKS.items() if part in result["environment"]["device"]), None)
    if peak is None or step is None:
        return ""
    return f"{training_flops(Workload(**result['workload'])) / step.median / peak:.1%}"


def _ratio_table(result: Result) -> str:
    cells = []
    for ours, peer in pairs(result["configurations"]):
        step = ratio_of(result, ours, peer)
        memory = ratio_of(result, ours, peer, "resident")
        if step is not None and memory is not None:
            quartiles = f"{step.low:.3f} to {step.high:.3f}"
            cells.append((f"{ours} / {peer}", f"{step.median:.3f}", quartiles, str(step.count), f"{memory.median:.3f}"))
    return _table(("ratio", "step", "quartiles", "rounds", "peak memory"), cells)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.01 else f"{seconds * 1e3:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; nothing if it has no rows."""
    lines = [" | ".join(row) for row in rows]
    if not lines:
        return ""
    ruler = " | ".join(["---"] + ["---:"] * (len(head) - 1))
    return "\n".join(f"| {line} |" for line in [" | ".join(head), ruler, *lines])


# ---------------------------------------------------------------------- figure


def draw(results: Mapping[str, Result], file: Path) -> None:
    """A row for each workload: step times, forward and backward apart, and peak memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.6 + 2.3 * len(results)), dpi=110, layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for (times, memory), (name, result) in zip(axes, results.items(), strict=True):
        configurations = list(result["configurations"])[::-1]
        colours = ["tab:blue" if label.startswith("ours") else "tab:gray" for label in configurations]
        for position, (label, colour) in enumerate(zip(configurations, colours, strict=True)):
            step, forward = _step(result, label), _step(result, label, "forward")
            if step is None or forward is None:
                continue
            times.barh(position, forward.median * 1e3, color=colour)
            times.barh(
                position, (step.median - forward.median) * 1e3, left=forward.median * 1e3, color=colour, alpha=0.6
            )
            times.plot([step.low * 1e3, step.high * 1e3], [position, position], color="black", linewidth=1.5)
        peaks = [_peak(result["configurations"][label]) / MEGA for label in configurations]
        memory.barh(range(len(peaks)), peaks, color=colours)
        times.set_yticks(range(len(configurations)), configurations, fontsize=8)
        memory.set_yticks([])
        times.set_title(f"{name}: ms for forward (dark) and backward, line: quartiles", fontsize=9)
        memory.set_title("peak resident MB per rank", fontsize=9)
    figure.savefig(file)
