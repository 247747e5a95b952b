"""The plan of a training run: memory, arithmetic, communication and time of one step, on one rank."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from hf_megatron.errors import PartitionError
from hf_megatron.planning.machine import Machine
from hf_megatron.planning.memory import MemoryPlan, local_numel, plan_memory
from hf_megatron.planning.roofline import Operation, head_operations, layer_operations, optimizer_bytes
from hf_megatron.planning.run import Run
from hf_megatron.planning.shape import ModelShape
from hf_megatron.planning.traffic import Collective, collectives, seconds

_ATTENTION = ("scores and context", "scale and mask", "softmax", "attention dropout")
_ENTRIES = ("query, key, value", "into the MLP")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step on one rank."""

    forward: float
    backward: float
    recomputation: float
    tensor_parallel: float  # collectives that no product hides
    data_parallel: float  # collectives that the backward pass does not hide
    optimizer: float  # clipping and Adam

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a run needs and how long its steps take."""

    shape: ModelShape
    run: Run
    machine: Machine
    num_parameters: int  # of the whole model
    memory: MemoryPlan  # on one rank
    fits: bool  # whether the peak is within what a GPU has to offer
    model_flops: int  # floating-point operations of one step over all ranks, without recomputation
    collectives: tuple[Collective, ...]  # of one step
    time: StepTime
    # One rank's time for the same micro-batches, if it had the memory, over the time of all ranks that share one.
    scaling_efficiency: float

    @property
    def bytes_sent(self) -> int:
        """Bytes that a rank sends to others in one step."""
        ranks = {"tp": self.run.tp_size, "dp": self.run.dp_size}
        return round(sum(c.count * c.bytes_sent(ranks[c.group]) for c in self.collectives))

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.run.micro_batch * self.run.accumulation * self.run.dp_size

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.global_batch * self.run.sequence_length / self.time.total

    @property
    def flops_utilisation(self) -> float:
        """Model FLOPs per second as a share of the peak of all GPUs (MFU)."""
        compute = self.run.precision.compute
        peak = self.machine.flops_16bit if compute == 2 else self.machine.flops_32bit
        return self.model_flops / self.time.total / (self.run.num_ranks * peak)


def plan(shape: ModelShape, run: Run, machine: Machine) -> TrainingPlan:
    """Plan one training step; raises what :meth:`Run.check` does."""
    run.check(shape)
    memory, time = plan_memory(shape, run), _step_time(shape, run, machine)
    alone = _step_time(shape, replace(run, tp_size=1, dp_size=1, fsdp=False, sequence_parallel=False), machine)
    return TrainingPlan(
        shape=shape,
        run=run,
        machine=machine,
        num_parameters=local_numel(shape, 1)[0],
        memory=memory,
        fits=memory.peak <= machine.usable_bytes,
        model_flops=model_flops(shape, run),
        collectives=tuple(collectives(shape, run)),
        time=time,
        scaling_efficiency=alone.total / (run.tp_size * time.total),
    )


def model_flops(shape: ModelShape, run: Run) -> int:
    """Operations of the matrix products of one step over all ranks: three times the forward pass's."""
    whole = replace(run, tp_size=1, sequence_parallel=False, attention="eager")
    forward = shape.num_layers * sum(o.flops for o in layer_operations(shape, whole))
    forward += sum(o.flops for o in head_operations(shape, whole))
    return 3 * forward * run.accumulation * run.dp_size


def layouts(
    shape: ModelShape,
    run: Run,
    machine: Machine,
    num_ranks: int,
    *,
    global_batch: int | None = None,
    kept: Collection[str] = (),
) -> list[TrainingPlan]:
    """Every way to train on ``num_ranks`` GPUs at one global batch, the best first.

    Tried are the tensor- and data-parallel degrees, FSDP, sequence parallelism and recomputation; the micro-batches per
    step follow from the global batch, by default ``run``'s micro-batches on every GPU. What ``kept`` names of the four
    stays as it is in ``run``. Best is what fits and trains most tokens per second, and of equals the plainer one; what
    does not fit comes last, by its peak. A tensor-parallel group stays inside a node. PartitionError if no layout can
    have this global batch.
    """
    global_batch = run.micro_batch * run.accumulation * num_ranks if global_batch is None else global_batch
    plans, refused = [], ""
    for tp_size in _choices(run, kept, "tp_size", range(1, min(num_ranks, machine.gpus_per_node) + 1)):
        dp_size, rest = divmod(num_ranks, tp_size)
        if rest:
            continue
        accumulation, rest = divmod(global_batch, run.micro_batch * dp_size)
        if rest or not accumulation:
            refused = f"{global_batch} sequences are no whole micro-batches of {run.micro_batch} on {dp_size} ranks"
            continue
        for fsdp, split, recompute in product(
            _choices(run, kept, "fsdp", (False, True) if dp_size > 1 else (False,)),
            _choices(run, kept, "sequence_parallel", (False, True) if tp_size > 1 else (False,)),
            _choices(run, kept, "recompute", ("none", "selective", "full")),
        ):
            candidate = replace(
                run,
                tp_size=tp_size,
                dp_size=dp_size,
                accumulation=accumulation,
                fsdp=fsdp,
                sequence_parallel=split,
                recompute=recompute,
            )
            if recompute == "selective" and "recompute" not in kept and not candidate.keeps_probabilities(shape):
                continue  # there would be nothing to compute again
            try:
                plans.append(plan(shape, candidate, machine))
            except ValueError:  # a degree that the model cannot be cut to
                continue
    if not plans and refused:
        raise PartitionError(f"{refused}; choose another global batch or micro-batch.")
    return sorted(plans, key=lambda p: (not p.fits, -p.tokens_per_second if p.fits else p.memory.peak))


def _choices(run: Run, kept: Collection[str], name: str, values: Iterable[Any]) -> list[Any]:
    return [getattr(run, name)] if name in kept else list(values)


def _step_time(shape: ModelShape, run: Run, machine: Machine) -> StepTime:
    layer, head = list(layer_operations(shape, run)), list(head_operations(shape, run))
    forward = shape.num_layers * _forward(layer, machine) + _forward(head, machine)
    backward = shape.num_layers * sum(operation.backward_seconds(machine) for operation in layer)
    backward += sum(operation.backward_seconds(machine) for operation in head)
    again: list[Operation] = []
    if run.recompute == "full":
        again = layer
    elif run.recompute == "selective" and run.keeps_probabilities(shape):
        again = [operation for operation in layer if operation.name in _ATTENTION]
    travel = {"tp": 0.0, "dp": 0.0, "overlapped": 0.0}
    for collective in collectives(shape, run):
        kind = "overlapped" if collective.is_overlapped else collective.group
        travel[kind] += seconds(collective, run, machine)
    # Hidden behind one of the two products in the backward pass of a layer's entries; and gradients are reduced while
    # those of earlier layers are computed, by the last micro-batch's backward pass.
    entries = sum(operation.forward_seconds(machine) for operation in layer if operation.name in _ENTRIES)
    exposed = max(0.0, travel["overlapped"] - shape.num_layers * run.accumulation * entries)
    return StepTime(
        forward=forward * run.accumulation,
        backward=backward * run.accumulation,
        recomputation=shape.num_layers * _forward(again, machine) * run.accumulation,
        tensor_parallel=travel["tp"] + exposed,
        data_parallel=max(0.0, travel["dp"] - backward),
        optimizer=optimizer_bytes(shape, run) / machine.bandwidth,
    )


def _forward(operations: list[Operation], machine: Machine) -> float:
    return sum(operation.forward_seconds(machine) for operation in operations)
