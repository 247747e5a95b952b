"""The training step as tables in Markdown and as a figure, computed from the raw samples."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers.competitors import Configuration
from benchmarks.peers.derived import CARD, Result, pairs, peak_of, ratio_of, spread_of
from benchmarks.peers.tables import MEGA, machine, milliseconds, quartiles, table
from benchmarks.peers.targets import reached
from benchmarks.peers.workload import Workload

__all__ = ["draw", "markdown"]


def markdown(results: Mapping[str, Result]) -> str:
    """All tables: the targets, and for each workload its configurations and their ratios."""
    parts = [table(("work", "target", "ours / peer", "quartiles", "rounds", "met"), _target_rows(results))]
    for name, result in results.items():
        parts += [f"### {name}", _caption(result), _configuration_table(result), _ratio_table(result)]
        parts += [f"{failed} did not run: {error}" for failed, error in result["failed"].items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _target_rows(results: Mapping[str, Result]) -> Iterator[Sequence[str]]:
    for target, ratio, is_met in reached(results):
        numbers = f"{target.at_most:.2f}", f"{ratio.median:.3f}", quartiles(ratio)
        yield target.work, *numbers, str(ratio.count) if ratio.count > 1 else "", "yes" if is_met else "no"


def _caption(result: Result) -> str:
    workload = Workload(**result["workload"])
    return (
        f"{workload.layers} layers, hidden {workload.hidden}, {workload.heads} heads, vocabulary {workload.vocab}, "
        f"{workload.batch} x {workload.sequence} tokens, {workload.dtype}. {machine(result['environment'])}"
    )


def _has_card(result: Result) -> bool:
    return any("allocated" in seen["memory"][0][0]["peak"] for seen in result["configurations"].values())


def _configuration_table(result: Result) -> str:
    head = ["configuration", "step ms", "quartiles", "forward", "backward", "CPU ms", "AdamW ms", "tokens/s"]
    head += ["GPU peak MB", "planned MB", "MFU"] if _has_card(result) else ["peak MB", "of it imports"]
    head += ["activations and workspace", "collectives", "MB sent", "clean samples"]
    return table(head, (_configuration_row(result, name) for name in result["configurations"]))


def _configuration_row(result: Result, name: str) -> Sequence[str]:
    seen, workload = result["configurations"][name], Workload(**result["workload"])
    ways = [seen["communication"][0][way] for way in ("forward", "backward")]
    step = spread_of(result, name)
    return [
        name,
        *_times(result, name),
        milliseconds(max(statistics.median(rank["seconds"]) for rank in seen["optimizer"])),
        "" if step is None else f"{workload.tokens / step.median:.0f}",
        *_memory(result, name),
        " + ".join(str(sum(way["count"].values())) for way in ways),
        " + ".join(f"{sum(way['bytes'].values()) / MEGA:.1f}" for way in ways),
        f"{step.count if step else 0} of {len(seen['samples'])}",
    ]


def _times(result: Result, name: str) -> Sequence[str]:
    step = spread_of(result, name)
    if step is None:
        return ["", "", "", "", ""]
    parts = [spread_of(result, name, figure) for figure in ("forward", "backward", "processor")]
    middle_half = f"{milliseconds(step.low)} to {milliseconds(step.high)}"
    return [milliseconds(step.median), middle_half, *(milliseconds(part.median) for part in parts if part)]


def _memory(result: Result, name: str) -> Sequence[str]:
    seen, has_card = result["configurations"][name], _has_card(result)
    first = seen["memory"][0][0]
    peak = peak_of(result, name, "allocated" if has_card else "resident")
    # The gradients are as large as the weights. On a GPU nothing is imported.
    imports = 0 if has_card else seen["hello"][0]["resident"]
    beyond = peak - imports - 2 * first["weights"]
    if not has_card:
        return [f"{peak / MEGA:.0f}", f"{imports / MEGA:.0f}", f"{beyond / MEGA:.0f}"]
    planned, floor = seen.get("planned_bytes"), ratio_of(result, name, CARD)
    return [
        f"{peak / MEGA:.0f}",
        "" if planned is None else f"{planned / MEGA:.0f}",
        "" if floor is None else f"{1 / floor.median:.1%}",
        f"{beyond / MEGA:.0f}",
    ]


def _ratio_table(result: Result) -> str:
    kind = "allocated" if _has_card(result) else "resident"
    rows = []
    for ours, peer in pairs(result["configurations"]):
        step, memory = ratio_of(result, ours, peer), ratio_of(result, ours, peer, kind)
        assert memory is not None
        time = ["", "", "0"] if step is None else [f"{step.median:.3f}", quartiles(step), str(step.count)]
        rows.append([f"{ours} / {peer}", *time, f"{memory.median:.3f}"])
    return table(("ratio", "step", "quartiles", "rounds", "peak memory"), rows)


def draw(results: Mapping[str, Result], file: Path) -> None:
    """A row for each workload: on the left step times, on the right peak memory."""
    figure = Figure(figsize=(12, 0.9 + 2.5 * len(results)), dpi=110, layout="constrained")
    figure.supxlabel(
        "Dark: forward, light: backward, line: the middle half of the samples. Compare whole bars: ours computes the "
        "gradients of the output layer in its forward pass,\nthe others in their backward pass. "
        "Each rank has one thread; shorter is better.",
        fontsize=9,
    )
    for axes, result in zip(figure.subplots(len(results), 2, squeeze=False), results.values(), strict=True):
        _draw_workload(axes, result)
    figure.savefig(file)


def _draw_workload(axes: Sequence[Axes], result: Result) -> None:
    times, memory = axes
    workload = Workload(**result["workload"])
    labels = list(result["configurations"])[::-1]
    colours = ["tab:blue" if label.startswith("ours") else "tab:gray" for label in labels]
    style: dict[str, Any] = {"height": 0.7}
    for position, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        step, forward = spread_of(result, label), spread_of(result, label, "forward")
        if step is not None and forward is not None:
            first, whole = forward.median * 1e3, step.median * 1e3
            times.barh(position, first, color=colour, **style)
            times.barh(position, whole - first, left=first, color=colour, alpha=0.6, **style)
            times.plot([step.low * 1e3, step.high * 1e3], [position] * 2, color="black", linewidth=1.5)
    kind = "allocated" if _has_card(result) else "resident"
    memory.barh(range(len(labels)), [peak_of(result, label, kind) / MEGA for label in labels], color=colours, **style)
    times.set_yticks(range(len(labels)), [Configuration.parse(label).title for label in labels], fontsize=9)
    memory.set_yticks([])
    name = {"gpt2": "GPT-2", "bert": "BERT"}[workload.model]
    times.set_title(f"{name}, {workload.product_dtype}, vocabulary {workload.vocab}: ms per training step", fontsize=10)
    memory.set_title(f"peak {kind} memory per rank, MB", fontsize=10)
    if workload.model == "bert":
        share = f"the {workload.labelled:.0%} of positions that have a label"
        times.set_xlabel(
            f"Not like for like: ours computes the output layer for {share}, the others for all", fontsize=9
        )
