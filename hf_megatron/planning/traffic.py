"""Every collective of a training step, and how long it takes on a machine.

Shapes: B batch, S sequence, H hidden, T predicted positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hf_megatron.planning.machine import Machine
from hf_megatron.planning.memory import gathered_parts
from hf_megatron.planning.run import Run
from hf_megatron.planning.shape import ModelShape

__all__ = ["Collective", "collectives", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Collectives of one kind.

    Attributes:
        purpose: What travels, and when.
        operation: Which.
        group: Over which ranks.
        count: How many a training step has.
        bytes: Size of the whole tensor that each of them sums, gathers or scatters.
    """

    purpose: str
    operation: Literal["all-reduce", "all-gather", "reduce-scatter"]
    group: Literal["tp", "dp"]
    count: int
    bytes: int

    def bytes_sent(self, num_ranks: int) -> float:
        """Bytes that each rank sends for one of them, in a ring."""
        passes = 2 if self.operation == "all-reduce" else 1
        return passes * (num_ranks - 1) / num_ranks * self.bytes


def collectives(shape: ModelShape, run: Run) -> Iterator[Collective]:
    """The collectives of forward and backward pass. Clipping adds some of a few bytes."""
    if run.tp_size > 1:
        yield from _tensor_parallel(shape, run)
    if run.dp_size > 1:
        yield from _data_parallel(shape, run)


def _tensor_parallel(shape: ModelShape, run: Run) -> Iterator[Collective]:
    def all_reduce(purpose: str, count: int, num_bytes: int) -> Collective:
        return Collective(
            purpose=purpose, operation="all-reduce", group="tp", count=count * run.accumulation, bytes=num_bytes
        )

    precision, layers = run.precision, shape.num_layers
    activation = run.tokens * shape.hidden_size
    bias = 3 * shape.hidden_size if shape.is_causal else 0  # GPT-2's fused one, whose gradient travels along
    yield all_reduce("embedding, forward", 1, activation * precision.residual)
    yield all_reduce("layer outputs, forward", 2 * layers, activation * precision.compute)
    if run.recompute == "full":
        yield all_reduce("layer outputs, recomputed", 2 * layers, activation * precision.compute)
    # Gradients have the type of the norm's output.
    yield all_reduce("attention input, backward", layers, (activation + bias) * precision.residual)
    yield all_reduce("MLP input, backward", layers, activation * precision.residual)
    if predicted := run.predicted(shape):
        yield all_reduce("loss: maxima, forward", 1, predicted * 4)
        yield all_reduce("loss: sums, forward", 1, 2 * predicted * 4)
        yield all_reduce("head input, backward", 1, predicted * shape.hidden_size * precision.residual)


def _data_parallel(shape: ModelShape, run: Run) -> Iterator[Collective]:
    root, layer = gathered_parts(shape, run.tp_size)
    for name, count, elements in (("outside of the layers", 1, root), ("of each layer", shape.num_layers, layer)):
        if not run.fsdp:
            size = elements * run.precision.gradient
            yield Collective(purpose=f"gradients {name}", operation="all-reduce", group="dp", count=count, bytes=size)
            continue
        # A layer's parameters are gathered for the forward and again for the backward pass.
        gathers = count * (1 if name.startswith("outside") else 2) * run.accumulation
        size = elements * run.precision.parameter
        yield Collective(purpose=f"parameters {name}", operation="all-gather", group="dp", count=gathers, bytes=size)
        size, times = elements * run.precision.gradient, count * run.accumulation
        yield Collective(purpose=f"gradients {name}", operation="reduce-scatter", group="dp", count=times, bytes=size)


def seconds(collective: Collective, run: Run, machine: Machine) -> float:
    """How long all collectives of one kind take, one after the other.

    A ring inside a node is as fast as its links. Where a data-parallel ring leaves the node, the rings of all
    tensor-parallel ranks share what connects the nodes.
    """
    num_ranks = run.tp_size if collective.group == "tp" else run.dp_size
    sent = collective.bytes_sent(num_ranks)
    steps = (2 if collective.operation == "all-reduce" else 1) * (num_ranks - 1)
    transfer = sent / machine.link_bandwidth
    spans_nodes = (run.tp_size if collective.group == "tp" else run.num_ranks) > machine.gpus_per_node
    if spans_nodes:
        rings = min(run.tp_size, machine.gpus_per_node) if collective.group == "dp" else 1
        transfer = max(transfer, rings * sent / machine.node_bandwidth)
    return collective.count * (machine.latency_seconds + steps * machine.step_latency_seconds + transfer)
