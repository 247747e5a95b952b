"""Memory by kind over tensor-parallel degrees, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_megatron.errors import UnsupportedError
from hf_megatron.planning.machine import Machine
from hf_megatron.planning.memory import MemoryPlan, plan_memory
from hf_megatron.planning.run import Run
from hf_megatron.planning.shape import ModelShape

_KINDS = ("parameters", "gradients", "optimizer", "activations", "logits_and_loss", "communication")


def memory_by_degree(shape: ModelShape, run: Run, degrees: Sequence[int]) -> dict[int, MemoryPlan]:
    """The memory at each of these degrees that the model can be cut to."""
    found = {}
    for tp_size in degrees:
        candidate = replace(run, tp_size=tp_size)
        try:
            candidate.check(shape)
        except ValueError:
            continue
        found[tp_size] = plan_memory(shape, candidate)
    return found


def draw_memory(title: str, shape: ModelShape, run: Run, machine: Machine, file: Path) -> None:
    """Draw a stacked bar for each degree a node allows, a mark at its peak, and a line at what a GPU has.

    UnsupportedError if matplotlib is not installed, or does not write such files.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("A plot needs matplotlib: pip install 'hf-megatron[plot]'.") from error

    memory = memory_by_degree(shape, run, range(1, machine.gpus_per_node + 1))
    labels = [str(tp_size) for tp_size in memory]
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    bottom = [0.0] * len(memory)
    for kind in _KINDS:
        heights = [getattr(found, kind) / 1e9 for found in memory.values()]
        axes.bar(labels, heights, bottom=bottom, label=kind.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.scatter(labels, [found.peak / 1e9 for found in memory.values()], color="black", label="peak", zorder=3)
    axes.axhline(machine.usable_bytes / 1e9, color="black", linestyle="--", label=f"usable of {machine.name}")
    axes.set_xlabel("tensor-parallel degree")
    axes.set_ylabel("GB per rank")
    axes.set_title(title)
    axes.legend(fontsize="small")
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"The plot cannot be written to {file}: {error}.") from error
