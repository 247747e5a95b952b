"""``hf-megatron plan``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_megatron.commands.console import JsonOption, report
from hf_megatron.errors import UnsupportedError

if TYPE_CHECKING:
    from hf_megatron.planning import Run, TrainingPlan

_NUM_SHOWN = 12  # layouts, on a screen
_DEVICE = "a100-80gb"
_DEVICES = f"v100-32gb, a100-80gb, h100, h200 or a JSON file; by default {_DEVICE}, or with --compare that of the run."


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A size of the paper such as gpt2-8.3b, a config.json, a directory, or a repository."
        ),
    ] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel degree: 1; with --gpus any.")] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel degree: 1.")] = None,
    pp: Annotated[int, typer.Option(help="Pipeline stages: 1, as these models have none.")] = 1,
    gpus: Annotated[int | None, typer.Option(min=1, help="Find the best way to use so many.")] = None,
    global_batch: Annotated[int | None, typer.Option(min=1, help="Sequences of a step, with --gpus.")] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="Tell the hours for so many tokens.")] = None,
    micro_batch: Annotated[int, typer.Option(help="Sequences a rank computes at a time.")] = 1,
    seq: Annotated[int | None, typer.Option(help="Tokens per sequence; the model's longest by default.")] = None,
    accumulation: Annotated[int, typer.Option(help="Micro-batches per optimizer step.")] = 1,
    device: Annotated[str | None, typer.Option(help=_DEVICES)] = None,
    precision: Annotated[
        Literal["fp32", "amp", "bf16", "master"],
        typer.Option(help="amp: float32 weights, 16-bit autocast; master: 16-bit, float32 copies."),
    ] = "amp",
    recompute: Annotated[
        Literal["none", "selective", "full"] | None,
        typer.Option(help="What the backward pass computes again: none; with --gpus any."),
    ] = None,
    attention: Annotated[Literal["sdpa", "eager"], typer.Option(help="Fused, or written out.")] = "sdpa",
    sequence_parallel: Annotated[bool | None, typer.Option(help="Split along the sequence what TP replicates.")] = None,
    fsdp: Annotated[bool | None, typer.Option(help="Data-parallel ranks share weights and optimizer.")] = None,
    dropout: Annotated[bool, typer.Option("--dropout/--no-dropout", help="The configuration's dropout.")] = True,
    compare: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Hold a finished run, its output directory, against its plan.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw memory by kind over TP degrees.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Say what training needs per rank, whether it fits, and how long a step takes, before anything is rented.

    Exits with 1 if it does not fit.
    """
    if compare is not None:
        return _compare(compare, model, device, as_json)
    if model is None:
        raise UnsupportedError("Name a MODEL to plan for, or a finished run by --compare.")
    if pp != 1:
        raise UnsupportedError(f"pp_size={pp}: these models have no pipeline stages; use tp_size and dp_size.")
    asked = {"tp_size": tp, "dp_size": dp, "fsdp": fsdp, "sequence_parallel": sequence_parallel, "recompute": recompute}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    given |= {"micro_batch": micro_batch, "accumulation": accumulation, "attention": attention, "dropout": dropout}
    ways = _plans(model, device or _DEVICE, precision, given, seq=seq, gpus=gpus, global_batch=global_batch)
    best = ways[0]
    if plot is not None:
        from hf_megatron.planning.chart import draw_memory

        draw_memory(f"{model}, micro-batch {best.run.micro_batch}", best.shape, best.run, best.machine, plot)
    result, shown = {"model": model, **_numbers(best)}, _lines(best)
    if tokens is not None:
        result["hours"] = hours = tokens / best.tokens_per_second / 3600
        shown[f"hours for {tokens:,.0f} tokens"] = round(hours, 1)
    if gpus is not None:
        result["layouts"] = [_layout(way) for way in ways]
        shown["layouts, best first"] = _layout_lines(ways)
    return report(model, result, as_json, shown=shown, ok=best.fits)


def _compare(directory: Path, model: str | None, device: str | None, as_json: bool) -> int:
    """What a finished run has measured beside its plan, for the machine given or the one that it ran on, if known."""
    from hf_megatron.checkpoint import read_json
    from hf_megatron.planning import PRECISIONS, ModelShape, Run, machine_named, machine_of_device, plan
    from hf_megatron.planning.run import RUN_FILE

    if model is not None:
        raise UnsupportedError(f"--compare {directory} says itself which model it was; leave {model} out.")
    path = directory / RUN_FILE
    if not path.is_file():
        raise UnsupportedError(f"{directory} has no {RUN_FILE}, which MegatronTrainer writes at the end of a run.")
    try:
        record = read_json(path)
        run = Run(**{**record["run"], "precision": PRECISIONS[record["run"]["precision"]]})
        ran_on, names = str(record["device"]), ("peak_memory_bytes", "step_seconds", "tokens_per_second")
        measured = {name: float(record["measured"][name]) for name in names}
        known = machine_of_device(ran_on) if device is None else machine_named(device)
        planned = plan(ModelShape.from_config(record["config"]), run, known or machine_named(_DEVICE))
    except (KeyError, TypeError) as error:
        raise UnsupportedError(f"{path} is not the record of a run ({error}).") from error
    figures: dict[str, float] = {"peak_memory_bytes": planned.memory.peak}
    if known is not None:
        figures |= {"step_seconds": planned.time.total, "tokens_per_second": planned.tokens_per_second}
    rows = {
        name: {"planned": figure, "measured": measured[name], "ratio": measured[name] / figure}
        for name, figure in figures.items()
    }
    shown: dict[str, Any] = {"layout": f"{_name(run)} on {ran_on}"}
    units = {"peak_memory_bytes": ("GB per rank", 1e9), "step_seconds": ("seconds per step", 1.0)}
    for name, row in rows.items():
        unit, size = units.get(name, ("tokens per second", 1.0))
        ours, planned_figure = (_short(row[key] / size) for key in ("measured", "planned"))
        shown[unit] = f"measured {ours}, planned {planned_figure}: {_short(row['ratio'])} times the plan"
    if run.device == "cpu":
        shown["GB per rank"] += "; measured is the whole process, with interpreter and libraries, which are not planned"
    if known is None:
        speed = f"measured {_short(measured['tokens_per_second'])}"
        shown["tokens per second"] = f"{speed}; for a plan, describe the machine by --device FILE.json"
    result = {"device": ran_on, "run": record["run"], "compared": rows, "measured": measured}
    return report(str(directory), result, as_json, shown=shown)


def _short(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def _plans(
    model: str,
    device: str,
    precision: str,
    given: dict[str, Any],
    *,
    seq: int | None,
    gpus: int | None,
    global_batch: int | None,
) -> list[TrainingPlan]:
    """The plan of one run, or of each way to divide the GPUs, the best first.

    ``given`` holds further arguments of ``Run``; with ``gpus`` the others are chosen.
    """
    from hf_megatron.planning import PRECISIONS, ModelShape, Run, layouts, machine_named, plan

    machine, shape = machine_named(device), ModelShape.from_config(_config_of(model))
    run = Run(sequence_length=seq or shape.num_positions, precision=PRECISIONS[precision], **given)
    if gpus is None:
        if global_batch is not None:
            raise UnsupportedError("a global batch is for --gpus; without, give --dp and --accumulation.")
        return [plan(shape, run, machine)]
    if "dp_size" in given:
        raise UnsupportedError("dp_size follows from the number of GPUs and tp_size; leave --dp or --gpus out.")
    ways = layouts(shape, run, machine, gpus, global_batch=global_batch, kept=given.keys())
    if not ways:
        degree = f" at tp_size={run.tp_size}" if "tp_size" in given else ""
        raise UnsupportedError(f"{model} cannot be divided over {gpus} GPUs{degree}.")
    return ways


def _config_of(model: str) -> Mapping[str, Any]:
    """The config.json of a preset, of a file, of a checkpoint directory in any format, or of a Hub repository."""
    from hf_megatron.architectures.presets import PRESETS, preset_named
    from hf_megatron.checkpoint import read_json
    from hf_megatron_conversion.formats import format_of, read_model
    from hf_megatron_conversion.formats.base import SourceOptions
    from hf_megatron_conversion.source import source_directory

    if model.lower() in PRESETS:
        return preset_named(model).config
    if model.endswith(".json"):
        return read_json(Path(model))
    try:
        directory = source_directory(model, config_only=True)
    except ValueError as error:
        raise UnsupportedError(f"{error} Presets are {', '.join(PRESETS)}.") from error
    if format_of(directory).has_config:
        return read_json(directory / "config.json")
    return read_model(directory, SourceOptions(is_only_described=True)).config


def _numbers(planned: TrainingPlan) -> dict[str, Any]:
    """A plan for scripts."""
    run, time = planned.run, planned.time
    return {
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
    """One way to divide the GPUs, for scripts."""
    chosen = ("tp_size", "dp_size", "accumulation", "fsdp", "sequence_parallel", "recompute")
    return {
        **{name: getattr(planned.run, name) for name in chosen},
        "fits": planned.fits,
        "peak_bytes": planned.memory.peak,
        "step_seconds": planned.time.total,
        "tokens_per_second": planned.tokens_per_second,
    }


def _lines(planned: TrainingPlan) -> dict[str, Any]:
    """A plan for people."""
    run, machine, memory = planned.run, planned.machine, vars(planned.memory)
    seconds = {**vars(planned.time), "total": planned.time.total}
    width = max(len(kind) for kind in memory)
    verdict = "fits" if planned.fits else "does not fit"
    return {
        "layout": f"{_name(run)} on {machine.name}",
        "assumed": [
            f"global batch {planned.global_batch:,} of {run.sequence_length:,} tokens each: micro-batch "
            f"{run.micro_batch} x accumulation {run.accumulation} x DP {run.dp_size}",
            f"precision {run.precision.name}: {run.precision.meaning}",
            f"recomputation {run.recompute}, attention {run.attention}, dropout {'on' if run.dropout else 'off'}",
        ],
        "parameters": planned.num_parameters,
        "GB per rank": [f"{kind.replace('_', ' '):{width}} {size / 1e9:8.2f}" for kind, size in memory.items()],
        "memory": f"{verdict}: {memory['peak'] / 1e9:.1f} of {machine.usable_bytes / 1e9:.1f} GB",
        "FLOPs per step": f"{planned.model_flops:.3g} over all ranks",
        "collectives per step": [
            f"{c.count} x {c.operation} over {c.group} of {c.bytes / 1e6:,.2f} MB: {c.purpose}"
            for c in planned.collectives
        ],
        "seconds per step": [f"{part.replace('_', ' '):15} {value:8.3f}" for part, value in seconds.items()],
        "tokens per second": round(planned.tokens_per_second),
        "share of peak FLOP/s": planned.flops_utilisation,
        "scaling efficiency": f"{planned.scaling_efficiency:.1%} of one GPU that had the memory for its micro-batches",
        "figures from": machine.source or "-",
    }


def _layout_lines(ways: list[TrainingPlan]) -> list[str]:
    lines = [
        f"{_name(way.run)}: {'' if way.fits else 'does not fit, '}{way.memory.peak / 1e9:.1f} GB, "
        f"{way.time.total:.3f} s, {way.tokens_per_second:,.0f} tokens/s"
        for way in ways[:_NUM_SHOWN]
    ]
    return lines + ([f"and {len(ways) - _NUM_SHOWN} more: --json has all"] if len(ways) > _NUM_SHOWN else [])


def _name(run: Run) -> str:
    """A layout in a few words."""
    extras = [
        f"x {run.accumulation} micro-batches" if run.accumulation > 1 else "",
        "FSDP" if run.fsdp else "",
        "split sequences" if run.sequence_parallel else "",
        f"{run.recompute} recomputation" if run.recompute != "none" else "",
    ]
    return ", ".join([f"TP {run.tp_size} x DP {run.dp_size}", *(extra for extra in extras if extra)])
