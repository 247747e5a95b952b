"""``hf-megatron plan``: what a model needs and how fast it trains, as numbers for scripts and as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_megatron.architectures.presets import PRESETS, preset_named
from hf_megatron.errors import UnsupportedError
from hf_megatron.planning import PRECISIONS, ModelShape, Run, TrainingPlan, layouts, machine_named, plan
from hf_megatron.planning.chart import draw_memory
from hf_megatron_conversion.formats import format_of, read_model
from hf_megatron_conversion.formats.base import Given, load_config
from hf_megatron_conversion.source import source_directory

_GIGA = 1e9
_NUM_SHOWN = 12  # layouts, on a screen


def plan_run(
    model: str,
    *,
    device: str,
    precision: str,
    sequence_length: int | None,
    pp_size: int = 1,
    num_gpus: int | None = None,
    global_batch: int | None = None,
    num_tokens: float | None = None,
    plot: Path | None = None,
    **run: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan a run, and the ways to divide a number of GPUs for it.

    Args:
        model: A preset, a config.json, a checkpoint directory, or a repository on the Hub.
        device: A machine's name, or the JSON file of one.
        precision: See ``hf_megatron.planning.PRECISIONS``.
        sequence_length: Of the training examples; the model's longest if None.
        pp_size: Pipeline stages, which these models have one of.
        num_gpus: If given, the best layout for so many is looked for, see ``hf_megatron.planning.layouts``.
        global_batch: Sequences of a step, with ``num_gpus``.
        num_tokens: How many tokens to tell the hours for.
        plot: File to draw the memory over tensor-parallel degrees to.
        **run: As for ``hf_megatron.planning.Run``; what is None was not asked for, and is chosen with ``num_gpus``.

    Returns:
        The result for scripts, and what is shown of it to people.

    Raises:
        UnsupportedError: No such model, machine or feature.
        PartitionError: The layout does not fit the model.
    """
    if pp_size != 1:
        raise UnsupportedError(f"pp_size={pp_size}: these models have no pipeline stages; use tp_size and dp_size.")
    machine, shape = machine_named(device), ModelShape.from_config(config_of(model))
    given = {name: value for name, value in run.items() if value is not None}
    wanted = Run(sequence_length=sequence_length or shape.num_positions, precision=PRECISIONS[precision], **given)
    ways = []
    if num_gpus is not None:
        if "dp_size" in given:
            raise UnsupportedError("dp_size follows from the number of GPUs and tp_size; leave --dp or --gpus out.")
        ways = layouts(shape, wanted, machine, num_gpus, global_batch=global_batch, kept=given.keys())
        if not ways:
            degree = f" at tp_size={wanted.tp_size}" if "tp_size" in given else ""
            raise UnsupportedError(f"{model} cannot be divided over {num_gpus} GPUs{degree}.")
    elif global_batch is not None:
        raise UnsupportedError("a global batch is for --gpus; without, give --dp and --accumulation.")
    best = ways[0] if ways else plan(shape, wanted, machine)
    if plot is not None:
        draw_memory(f"{model}, micro-batch {best.run.micro_batch}", shape, best.run, machine, plot)
    result = _result(model, best)
    if num_tokens is not None:
        result["hours"] = num_tokens / best.tokens_per_second / 3600
    if ways:
        result["layouts"] = [_layout(way) for way in ways]
    return result, _shown(best, ways, num_tokens)


def config_of(model: str) -> Mapping[str, Any]:
    """The config.json of a preset, of a file, of a checkpoint directory in any format, or of a Hub repository."""
    if model.lower() in PRESETS:
        return preset_named(model).config
    if model.endswith(".json"):
        return load_config(Path(model))
    try:
        directory = source_directory(model, config_only=True)
    except ValueError as error:
        raise UnsupportedError(f"{error} Presets are {', '.join(PRESETS)}.") from error
    if format_of(directory).has_config:
        return load_config(directory / "config.json")
    return read_model(directory, Given(is_only_described=True)).config


def _result(model: str, planned: TrainingPlan) -> dict[str, Any]:
    """What scripts get."""
    run, time = planned.run, planned.time
    return {
        "model": model,
        "num_parameters": planned.num_parameters,
        "device": planned.machine.name,
        "run": {**vars(run), "precision": run.precision.name},
        "bytes_per_rank": vars(planned.memory),
        "usable_bytes": planned.machine.usable_bytes,
        "fits": planned.fits,
        "global_batch": planned.global_batch,
        "model_flops_per_step": planned.model_flops,
        "collectives_per_step": sum(collective.count for collective in planned.collectives),
        "bytes_communicated_per_step": planned.bytes_sent,
        "collectives": [vars(collective) for collective in planned.collectives],
        "step_seconds": time.total,
        "seconds": vars(time),
        "tokens_per_second": planned.tokens_per_second,
        "flops_utilisation": planned.flops_utilisation,
        "scaling_efficiency": planned.scaling_efficiency,
        "source": planned.machine.source,
    }


def _layout(planned: TrainingPlan) -> dict[str, Any]:
    """One way to divide the GPUs."""
    return {
        "tp_size": planned.run.tp_size,
        "dp_size": planned.run.dp_size,
        "accumulation": planned.run.accumulation,
        "fsdp": planned.run.fsdp,
        "sequence_parallel": planned.run.sequence_parallel,
        "recompute": planned.run.recompute,
        "fits": planned.fits,
        "peak_bytes": planned.memory.peak,
        "step_seconds": planned.time.total,
        "tokens_per_second": planned.tokens_per_second,
    }


def _shown(planned: TrainingPlan, ways: list[TrainingPlan], num_tokens: float | None) -> dict[str, Any]:
    """What people get."""
    run, time, machine = planned.run, planned.time, planned.machine
    memory = vars(planned.memory)
    width = max(len(kind) for kind in memory)
    verdict = "fits" if planned.fits else "does not fit"
    shown = {
        "layout": f"{_name(run)} on {machine.name}",
        "assumed": [
            f"global batch {planned.global_batch:,} of {run.sequence_length:,} tokens each: micro-batch "
            f"{run.micro_batch} x accumulation {run.accumulation} x DP {run.dp_size}",
            f"precision {run.precision.name}: {run.precision.meaning}",
            f"recomputation {run.recompute}, attention {run.attention}, dropout {'on' if run.dropout else 'off'}",
        ],
        "parameters": planned.num_parameters,
        "GB per rank": [f"{kind.replace('_', ' '):{width}} {size / _GIGA:8.2f}" for kind, size in memory.items()],
        "memory": f"{verdict}: {memory['peak'] / _GIGA:.1f} of {machine.usable_bytes / _GIGA:.1f} GB",
        "FLOPs per step": f"{planned.model_flops:.3g} over all ranks",
        "collectives per step": [
            f"{c.count} x {c.operation} over {c.group} of {c.bytes / 1e6:,.2f} MB: {c.purpose}"
            for c in planned.collectives
        ],
        "seconds per step": [f"{part.replace('_', ' '):15} {value:8.3f}" for part, value in vars(time).items()]
        + [f"{'total':15} {time.total:8.3f}"],
        "tokens per second": round(planned.tokens_per_second),
        "share of peak FLOP/s": planned.flops_utilisation,
        "scaling efficiency": f"{planned.scaling_efficiency:.1%} of one GPU that had the memory for its micro-batches",
        "figures from": machine.source or "-",
    }
    if num_tokens is not None:
        shown[f"hours for {num_tokens:,.0f} tokens"] = round(num_tokens / planned.tokens_per_second / 3600, 1)
    if ways:
        lines = [
            f"{_name(way.run)}: {'' if way.fits else 'does not fit, '}{way.memory.peak / _GIGA:.1f} GB, "
            f"{way.time.total:.3f} s, {way.tokens_per_second:,.0f} tokens/s"
            for way in ways
        ]
        more = [f"and {len(lines) - _NUM_SHOWN} more: --json has all"] if len(lines) > _NUM_SHOWN else []
        shown["layouts, best first"] = lines[:_NUM_SHOWN] + more
    return shown


def _name(run: Run) -> str:
    """A layout in a few words."""
    extras = [
        f"x {run.accumulation} micro-batches" if run.accumulation > 1 else "",
        "FSDP" if run.fsdp else "",
        "split sequences" if run.sequence_parallel else "",
        f"{run.recompute} recomputation" if run.recompute != "none" else "",
    ]
    return ", ".join([f"TP {run.tp_size} x DP {run.dp_size}", *(extra for extra in extras if extra)])
