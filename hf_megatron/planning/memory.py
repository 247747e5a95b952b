"""Bytes on the rank that needs most of them, by kind.

Parameters, gradients and optimizer follow from the table, to the byte; activations are summed up from
``activation_memory``. The peak is the largest of three moments: the loss and the start of the backward pass, when all
activations are there and hardly a gradient is, and the end of the backward pass, when it is the other way around. In
between, each layer trades one for the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, prod

from hf_megatron.planning.activation_memory import (
    Kept,
    chunk_tokens,
    has_square_matrices,
    kept_by_embedding,
    kept_by_head,
    kept_by_layer,
    kept_by_loss,
    kept_for_recomputation,
    vocabulary,
    weight_gradient_size,
)
from hf_megatron.planning.run import Run
from hf_megatron.planning.shape import ModelShape

_STEP_COUNTER = 4  # bytes; torch's Adam has one for each parameter


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int  # Adam's state
    # What autograd holds at the end of the forward pass, without the loss; and what is recomputed, of one layer.
    activations: int
    logits_and_loss: int  # the most there is while the loss computes the logits of its chunks, and gradients with them
    communication: int  # buffers of collectives; with FSDP also the parameters that are gathered
    peak: int  # the most there is at any moment; less than the sum, since activations go as gradients come


def plan_memory(shape: ModelShape, run: Run) -> MemoryPlan:
    """What a training step needs on rank 0, which holds the largest shards."""
    precision = run.precision
    shards = run.dp_size if run.fsdp else 1
    count, tensors = local_numel(shape, run.tp_size, shards)
    parameters, gradients = count * precision.parameter, count * precision.gradient
    optimizer = count * precision.optimizer + tensors * _STEP_COUNTER

    per_layer = _total(kept_by_layer(shape, run))
    recomputed = _total(kept_by_layer(shape, replace(run, recompute="none"))) - per_layer
    if run.recompute == "full":
        per_layer, recomputed = kept_for_recomputation(shape, run).bytes, per_layer
    ends = _total((*kept_by_embedding(shape, run), *kept_by_head(shape, run)))
    if recomputed and run.attention == "eager" and shape.table.is_causal:
        ends += run.micro_batch * run.sequence_length**2 * precision.residual  # the mask, an input of every layer
    activations = ends + shape.num_layers * per_layer
    logits_and_loss, kept = _loss_bytes(shape, run)
    # Gradients of hidden states on their way, and of what stands between the layers and the loss.
    on_the_way = 2 * run.local_tokens * shape.hidden_size * precision.residual
    of_head = sum(has_square_matrices(shape)) * shape.hidden_size**2 * precision.gradient
    of_layer = gathered_parts(shape, run.tp_size)[1] // shards * precision.gradient

    # Micro-batches after the first find the gradients of those before.
    earlier = gradients if run.accumulation > 1 else 0
    at_loss = activations + logits_and_loss + earlier
    at_start = activations + kept + of_head + on_the_way + earlier
    last_layer = per_layer + recomputed + on_the_way - (0 if earlier else of_layer)
    at_end = gradients + max(_second_embedding_gradient(shape, run), last_layer)
    communication = _communication_bytes(shape, run)
    return MemoryPlan(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations + recomputed,
        logits_and_loss=logits_and_loss,
        communication=communication,
        peak=parameters + optimizer + communication + max(at_loss, at_start, at_end),
    )


def local_numel(shape: ModelShape, tp_size: int, shards: int = 1) -> tuple[int, int]:
    """Elements of all parameters on rank 0, and the number of parameters.

    FSDP2 cuts dim 0 of each tensor-parallel shard over ``shards`` ranks; short ones are padded.
    """
    shapes = [tensor.spec.shard_shape(tensor.shape, tp_size, 0) for tensor in shape.tensors.values()]
    return sum(ceil(size[0] / shards) * prod(size[1:]) for size in shapes), len(shapes)


def _total(kept: Iterable[Kept]) -> int:
    return sum(tensor.bytes for tensor in kept)


def _loss_bytes(shape: ModelShape, run: Run) -> tuple[int, int]:
    """The most there is while head and loss are computed, chunk by chunk, and what they keep."""
    compute, predicted, rows = run.precision.compute, run.predicted(shape), vocabulary(shape, run)
    kept = _total(kept_by_loss(shape, run))
    if not predicted:
        return 0, kept
    first, weight = chunk_tokens(shape, run), rows * shape.hidden_size
    second = min(first, predicted - first)
    summed = weight * weight_gradient_size(shape, run)
    # A product in 16 bits is cast before it is added to a sum in 32, which is made of the first one.
    product = weight * compute if weight_gradient_size(shape, run) > compute else 0
    # A GPU makes the exponentials apart from the logits, of 16 bits by way of float32; a CPU does so row by row.
    exponentials = {"cpu": 0, "cuda": 8 if compute < 4 else 4}[run.device]
    moments = [
        first * rows * (compute + exponentials),
        first * rows * compute + product + summed,
        summed + second * rows * (compute + exponentials),
        summed + second * rows * compute + product,
    ]
    copies = weight * compute if run.precision.casts_weights else 0
    return copies + max(moments) + kept - summed, kept


def _communication_bytes(shape: ModelShape, run: Run) -> int:
    buffers = 0
    if run.tp_size > 1:
        buffers += run.tokens * shape.hidden_size * run.precision.compute  # the sum, beside what is added up
    if run.dp_size > 1:
        root, layer = gathered_parts(shape, run.tp_size)
        if run.fsdp:
            # The parts outside of the layers stay gathered; of the layers, one is used while the next one comes.
            buffers += (root + 2 * layer) * run.precision.compute
        buffers += max(root, layer) * run.precision.gradient
    return buffers


def gathered_parts(shape: ModelShape, tp_size: int) -> tuple[int, int]:
    """Elements on one tensor-parallel rank that FSDP2 gathers together: outside of the layers, and one layer."""
    layer = sum(prod(tensor.spec.shard_shape(tensor.shape, tp_size, 0)) for tensor in shape.layer)
    return local_numel(shape, tp_size)[0] - shape.num_layers * layer, layer


def _second_embedding_gradient(shape: ModelShape, run: Run) -> int:
    """On a GPU a tied embedding's gradient comes from the head and from the lookup, and is added up at the end.

    In place, but for a DTensor's: autograd makes a third one of these.
    """
    is_tied = shape.model_class.is_language_model and bool(shape.config.get("tie_word_embeddings", True))
    comes_twice = is_tied and run.device == "cuda"
    one = vocabulary(shape, run) * shape.hidden_size * run.precision.gradient
    return one * (2 if run.tp_size > 1 else 1) if comes_twice else 0
