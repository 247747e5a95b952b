"""Bytes on the rank that needs most of them, by kind.

Parameters, gradients and optimizer follow from the table, to the byte; activations are summed up from
``activation_memory``. The peak is the larger of two moments: the loss, when all activations are there and no gradient
is, and the end of the backward pass, when it is the other way around. In between, each layer trades one for the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, prod

from hf_megatron.planning.activation_memory import (
    Kept,
    chunk_tokens,
    kept_by_embedding,
    kept_by_head,
    kept_by_layer,
    kept_by_loss,
    kept_for_recomputation,
    vocabulary,
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
    # The logits of a chunk of positions with what is computed from them, and the gradients that the loss computes.
    logits_and_loss: int
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
    logits, loss = _loss_bytes(shape, run)
    communication = _communication_bytes(shape, run)

    # Micro-batches after the first find the gradients of those before.
    at_loss = activations + logits + loss + (gradients if run.accumulation > 1 else 0)
    at_end = gradients + per_layer + recomputed + _second_embedding_gradient(shape, run)
    return MemoryPlan(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations + recomputed,
        logits_and_loss=logits + loss,
        communication=communication,
        peak=parameters + optimizer + communication + max(at_loss, at_end),
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
    """What there is while the head and the loss of one chunk are computed, and what they keep."""
    precision, predicted, rows = run.precision, run.predicted(shape), vocabulary(shape, run)
    kept = _total(kept_by_loss(shape, run))
    if not predicted:
        return 0, kept
    chunk, weight = chunk_tokens(shape, run), rows * shape.hidden_size
    # The logits become their exponentials in place; of 16 bits by way of float32, which a CPU does row by row.
    logits = chunk * rows * (precision.compute + (4 if precision.compute < 4 and run.device == "cuda" else 0))
    copies = weight * precision.compute if precision.casts_weights else 0
    if chunk < predicted and precision.compute < 4:
        copies += weight * precision.compute  # a chunk's part of the weight's gradient, beside the sum
        copies += weight * 4 if precision.parameter < 4 else 0  # which is in float32
    return logits + copies, kept


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
    """On a GPU a tied embedding's gradient comes from the head and from the lookup, and is added up at the end."""
    is_tied = shape.model_class.is_language_model and bool(shape.config.get("tie_word_embeddings", True))
    comes_twice = is_tied and run.device == "cuda"
    return vocabulary(shape, run) * shape.hidden_size * run.precision.gradient if comes_twice else 0
