"""How long a rank computes: each operation takes as long as its arithmetic or its memory traffic, whichever is longer.

The traffic of an operation is what it reads and writes if every kernel goes to memory and back, as eager PyTorch does.
Not modelled: the time the host takes to launch kernels (which small models on fast GPUs are bound by), and products too
small to fill a GPU.

Shapes: B batch, S sequence, H hidden, F inner, V vocabulary, P ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from hf_megatron.planning.machine import Machine
from hf_megatron.planning.memory import local_numel
from hf_megatron.planning.run import Run
from hf_megatron.planning.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Operation:
    """A kernel, or several of one kind."""

    name: str
    flops: int  # of its forward pass; the backward pass of a product has twice as many
    forward_bytes: int  # read and written by its forward pass
    backward_bytes: int
    itemsize: int  # of its numbers

    def forward_seconds(self, machine: Machine) -> float:
        """Time of the forward pass."""
        return max(self.flops / machine.flops(self.itemsize), self.forward_bytes / machine.bandwidth)

    def backward_seconds(self, machine: Machine) -> float:
        """Time of the backward pass."""
        return max(2 * self.flops / machine.flops(self.itemsize), self.backward_bytes / machine.bandwidth)


def layer_operations(shape: ModelShape, run: Run) -> Iterator[Operation]:
    """One transformer layer on one rank."""
    tokens, hidden, ranks, compute = run.tokens, shape.hidden_size, run.tp_size, run.precision.compute
    columns, inner = ceil(hidden / ranks), ceil(shape.intermediate_size / ranks)
    yield _product("query, key, value", tokens, hidden, 3 * columns, compute)
    yield from _attention(shape, run)
    yield _product("attention output", tokens, columns, hidden, compute)
    yield _product("into the MLP", tokens, hidden, inner, compute)
    yield _elementwise("activation", tokens * inner, compute, 2, 3)
    yield _product("out of the MLP", tokens, inner, hidden, compute)
    if run.precision.casts_weights:
        yield _elementwise("16-bit copies of the matrices", shape.layer_matrices(ranks), compute, 3, 3)
    residual = run.local_tokens * hidden
    for place in ("attention", "MLP"):
        # The norm's backward reads both operands twice, for its input and for its weights.
        yield _elementwise(f"{place} norm", residual, run.precision.residual, 2, 5)
        yield _elementwise(f"{place} residual", residual, run.precision.residual, 3, 3)
        if run.dropout and shape.residual_dropout > 0:
            yield _elementwise(f"{place} dropout", residual, compute, 2.5, 2.5)
        yield _elementwise(f"{place} bias", residual, compute, 0, 1)  # added by the product; its gradient is a sum
        if ranks > 1:  # a collective reads what it sums and writes the sum
            yield _elementwise(f"{place} memory traffic of the collectives", tokens * hidden, compute, 2, 2)


def head_operations(shape: ModelShape, run: Run) -> Iterator[Operation]:
    """Embedding, final norm, head and loss on one rank."""
    residual, compute = run.local_tokens * shape.hidden_size, run.precision.compute
    yield _elementwise("embedding and final norm", residual, run.precision.residual, 6, 6)
    if predicted := run.predicted(shape):
        vocabulary = ceil(shape.vocab_size / run.tp_size)
        if shape.head_has("hidden_size", "hidden_size"):
            yield _product("transform", predicted, shape.hidden_size, shape.hidden_size, compute)
        yield _product("logits", predicted, shape.hidden_size, vocabulary, compute)
        # Maximum, difference, exponential, sums, casts.
        yield _elementwise("loss", predicted * vocabulary, 4, 9, 2)


def optimizer_bytes(shape: ModelShape, run: Run) -> int:
    """What Adam and clipping read and write: state and weights twice, gradients for norm, clipping and update."""
    count, _ = local_numel(shape, run.tp_size, run.dp_size if run.fsdp else 1)
    precision = run.precision
    return count * (2 * (precision.parameter + precision.optimizer) + 4 * precision.gradient)


def _attention(shape: ModelShape, run: Run) -> Iterator[Operation]:
    """The scores and what is done with them, by this rank's heads."""
    heads = run.micro_batch * run.heads(shape)
    head_dim, length, compute = shape.hidden_size // shape.num_heads, run.sequence_length, run.precision.compute
    flops = 4 * heads * length**2 * head_dim
    operands = 4 * heads * length * head_dim * compute  # Q, K, V and the context
    if not run.keeps_probabilities(shape):
        # The kernel recomputes the scores in its backward pass, and skips what a causal mask hides.
        flops = flops // 2 if shape.table.is_causal else flops
        yield Operation("fused attention", flops, operands, 5 * operands // 2, compute)
        return
    scores = heads * length**2
    yield _elementwise("heads laid out", heads * length * head_dim, compute, 8, 8)
    traffic = operands + 2 * scores * compute
    yield Operation("scores and context", flops, traffic, 2 * traffic, compute)
    yield _elementwise("scale and mask", scores, compute, 4, 4)
    yield _elementwise("softmax", scores, compute, 2, 3)
    if run.dropout and shape.attention_dropout > 0:
        yield _elementwise("attention dropout", scores, compute, 2.5, 2.5)


def _product(name: str, rows: int, inner: int, columns: int, itemsize: int) -> Operation:
    """[rows, inner] x [inner, columns]; its backward pass is two products of the same size."""
    traffic = itemsize * (rows * inner + inner * columns + rows * columns)
    return Operation(name, 2 * rows * inner * columns, traffic, 2 * traffic, itemsize)


def _elementwise(name: str, elements: int, itemsize: int, forward: float, backward: float) -> Operation:
    """Something that reads and writes so many tensors of this size."""
    return Operation(name, 0, int(elements * itemsize * forward), int(elements * itemsize * backward), itemsize)
