"""Every collective of a training step, and how long it takes on a machine.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3; Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Literal

from hf_megatron.partition import Replicated
from hf_megatron.planning.activation_memory import chunk_tokens
from hf_megatron.planning.machine import Machine
from hf_megatron.planning.memory import gathered_parts
from hf_megatron.planning.run import Run
from hf_megatron.planning.shape import ModelShape

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "exchange"]


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind."""

    purpose: str  # what travels, and when
    operation: Operation
    group: Literal["tp", "dp"]
    count: int  # in a training step
    bytes: int  # of the whole tensor that each of them sums, gathers or scatters; what a rank sends in an exchange
    is_overlapped: bool = False  # whether a product is computed meanwhile

    def bytes_sent(self, num_ranks: int) -> float:
        """Bytes that each rank sends for one of them, in a ring; in an exchange, to its neighbours."""
        if self.operation == "exchange":
            return self.bytes
        passes = 2 if self.operation == "all-reduce" else 1
        return passes * (num_ranks - 1) / num_ranks * self.bytes


def collectives(shape: ModelShape, run: Run) -> Iterator[Collective]:
    """The collectives of forward and backward pass. Clipping adds some of a few bytes."""
    if run.tp_size > 1:
        yield from _tensor_parallel(shape, run)
    if run.dp_size > 1:
        yield from _data_parallel(shape, run)


def _tensor_parallel(shape: ModelShape, run: Run) -> Iterator[Collective]:
    """Of all micro-batches of a step."""
    passes = 2 if run.recompute == "full" else 1
    of_layers = _sequence_parallel_layers if run.sequence_parallel else _replicated_layers
    for collective in (*of_layers(shape, run, passes), *_shared_heads(shape, run, passes), *_ends(shape, run)):
        yield replace(collective, count=collective.count * run.accumulation)


def _replicated_layers(shape: ModelShape, run: Run, passes: int) -> Iterator[Collective]:
    precision, layers = run.precision, shape.num_layers
    activation = run.tokens * shape.hidden_size
    fused_bias = sum(prod(t.shape) for t in shape.layer if isinstance(t.spec, Replicated) and t.spec.used)
    size = activation * precision.compute
    with_bias = size + fused_bias * precision.compute  # whose gradient travels along
    yield Collective("layer outputs, forward", "all-reduce", "tp", _sums(shape, run, passes), size)
    yield Collective("attention input, backward", "all-reduce", "tp", layers, with_bias, is_overlapped=run.overlap)
    yield Collective("MLP input, backward", "all-reduce", "tp", layers, size, is_overlapped=run.overlap)


def _sums(shape: ModelShape, run: Run, passes: int) -> int:
    """How often the ranks' terms of attention and MLP are summed up.

    Recomputation ends with the last thing that is kept. If neither dropout nor a norm follows the MLP, its sum is not
    computed again.
    """
    is_left_out = passes > 1 and shape.table.norms == "pre" and not (run.dropout and shape.residual_dropout)
    return shape.num_layers * (2 * passes - is_left_out)


def _sequence_parallel_layers(shape: ModelShape, run: Run, passes: int) -> Iterator[Collective]:
    layers, size = shape.num_layers, _padded(shape, run) * run.precision.compute
    yield Collective("layer inputs, forward", "all-gather", "tp", 2 * layers * passes, size)
    yield Collective("layer outputs, forward", "reduce-scatter", "tp", _sums(shape, run, passes), size)
    yield Collective("gradients of layer outputs, backward", "all-gather", "tp", 2 * layers, size)
    # The input once more, for the weight's gradient, while that of the input is computed; and the other way around.
    yield Collective("layer inputs, backward", "all-gather", "tp", 2 * layers, size, is_overlapped=run.overlap)
    gradients = "gradients of layer inputs, backward"
    yield Collective(gradients, "reduce-scatter", "tp", 2 * layers, size, is_overlapped=run.overlap)
    partial_sums = sum(
        prod(tensor.shape) for name, tensor in shape.tensors.items() if ".0." in name and _is_partial(shape, name)
    )
    yield Collective("norms and biases, backward", "all-reduce", "tp", layers, partial_sums * run.precision.gradient)


def _is_partial(shape: ModelShape, name: str) -> bool:
    """Whether a replicated parameter's gradient is a partial sum: a bias behind a sum over ranks sees all positions."""
    spec, weight = shape.tensors[name].spec, shape.tensors[f"{name.rpartition('.')[0]}.weight"].spec
    return isinstance(spec, Replicated) and (spec.used is not None or isinstance(weight, Replicated))


def _shared_heads(shape: ModelShape, run: Run, passes: int) -> Iterator[Collective]:
    """Columns of queries, keys and values of heads that lie on two ranks."""
    cuts = [shape.head_cut(run.tp_size, rank) for rank in range(run.tp_size)]
    if not cuts[0].is_shared:
        return
    column = 3 * run.tokens * run.precision.compute
    lent, lacking = max(sum(cut.lent) for cut in cuts), max(sum(cut.lacking) for cut in cuts)
    yield Collective("shared heads, forward", "exchange", "tp", shape.num_layers * passes, column * lent)
    yield Collective("shared heads, backward", "exchange", "tp", shape.num_layers, column * lacking)


def _ends(shape: ModelShape, run: Run) -> Iterator[Collective]:
    """Embedding, final norm, head and loss."""
    precision, predicted = run.precision, run.predicted(shape)
    yield Collective("embedding, forward", "all-reduce", "tp", 1, run.tokens * shape.hidden_size * precision.residual)
    is_split = run.sequence_parallel and shape.table.is_causal and predicted > 0  # GPT-2's head gathers by itself
    if run.sequence_parallel:
        size = _padded(shape, run) * precision.residual
        yield Collective("hidden states behind the layers, forward", "all-gather", "tp", 1, size)
        yield Collective("gradient of the embeddings, backward", "all-gather", "tp", 1, size)
        if is_split:
            yield Collective("gradient of the hidden states, backward", "reduce-scatter", "tp", 1, size)
        if shape.table.norms == "pre":
            yield Collective("final norm, backward", "all-reduce", "tp", 1, 2 * shape.hidden_size * precision.gradient)
    if predicted:
        chunks = ceil(predicted / chunk_tokens(shape, run))
        size = 3 * run.tp_size * predicted * 4 // chunks
        yield Collective("statistics of the loss, forward", "all-gather", "tp", chunks, size)
        if not is_split:
            size = predicted * shape.hidden_size * precision.residual // chunks
            yield Collective("gradient of the head's input, forward", "all-reduce", "tp", chunks, size)


def _padded(shape: ModelShape, run: Run) -> int:
    """Elements of [B, S, H] with the sequence filled up to a multiple of the degree."""
    return run.local_tokens * run.tp_size * shape.hidden_size


def _data_parallel(shape: ModelShape, run: Run) -> Iterator[Collective]:
    root, layer = gathered_parts(shape, run.tp_size)
    for name, count, elements in (("outside of the layers", 1, root), ("of each layer", shape.num_layers, layer)):
        if not run.fsdp:
            yield Collective(f"gradients {name}", "all-reduce", "dp", count, elements * run.precision.gradient)
            continue
        # A layer's parameters are gathered for the forward and again for the backward pass.
        gathers = count * (1 if name.startswith("outside") else 2) * run.accumulation
        yield Collective(f"parameters {name}", "all-gather", "dp", gathers, elements * run.precision.parameter)
        size, times = elements * run.precision.gradient, count * run.accumulation
        yield Collective(f"gradients {name}", "reduce-scatter", "dp", times, size)


def seconds(collective: Collective, run: Run, machine: Machine) -> float:
    """How long all collectives of one kind take, one after the other.

    A ring inside a node is as fast as its links. Where a data-parallel ring leaves the node, the rings of all
    tensor-parallel ranks share what connects the nodes.
    """
    num_ranks = run.tp_size if collective.group == "tp" else run.dp_size
    sent = collective.bytes_sent(num_ranks)
    steps = {"all-reduce": 2 * (num_ranks - 1), "exchange": 1}.get(collective.operation, num_ranks - 1)
    transfer = sent / machine.link_bandwidth
    spans_nodes = (run.tp_size if collective.group == "tp" else run.num_ranks) > machine.gpus_per_node
    if spans_nodes:
        rings = min(run.tp_size, machine.gpus_per_node) if collective.group == "dp" else 1
        transfer = max(transfer, rings * sent / machine.node_bandwidth)
    return collective.count * (machine.latency_seconds + steps * machine.step_latency_seconds + transfer)
