"""What the forward pass leaves behind for the backward pass: every tensor, by name, as autograd holds it.

Each storage counts once; parameters do not count. A test compares the sums with what autograd really holds.

Shapes: B batch, S sequence, H hidden, F inner, V vocabulary, P ranks; R is P where sequence parallelism splits what is
replicated otherwise, else 1.

Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4, counts the same tensors for fused kernels in 16 bits:
S B H (34 + 5 heads S / H) bytes per layer on one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from hf_megatron.planning.run import Run
from hf_megatron.planning.shape import ModelShape

__all__ = ["Kept", "kept_by_embedding", "kept_by_head", "kept_by_layer", "kept_by_loss", "kept_for_recomputation"]

_STATISTICS = 2 * 4  # bytes per token: mean and reciprocal deviation of a norm, in float32
_INDEX = 8  # bytes of a token id
_MASK = 1  # bytes of a bool


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that lives until the backward pass.

    Attributes:
        name: What it is.
        bytes: On one rank.
    """

    name: str
    bytes: int


def kept_by_embedding(shape: ModelShape, run: Run) -> Iterator[Kept]:
    """The token ids and positions [B, S], and what comes before the first layer."""
    yield Kept("token ids", run.tokens * _INDEX)
    yield Kept("positions", run.sequence_length * _INDEX)
    if run.tp_size > 1:
        yield Kept("which ids are other ranks'", run.tokens * _MASK)
    yield from _dropout("embedding", shape.embedding_dropout, shape, run)
    if _is_post(shape):
        yield from _norm("embedding norm", shape, run)


def kept_by_layer(shape: ModelShape, run: Run) -> Iterator[Kept]:
    """One transformer layer, with nothing recomputed but what ``selective`` says."""
    precision, ranks = run.precision, run.tp_size
    hidden = run.tokens * shape.hidden_size
    inner = run.tokens * ceil(shape.intermediate_size / ranks)
    yield from _norm("attention norm", shape, run)
    yield Kept("input of query, key, value [B, S, H]", hidden * precision.compute)
    yield Kept("query, key, value [B, S, 3H/P]", 3 * hidden // ranks * precision.compute)
    yield from _attention(shape, run)
    yield Kept("context [B, S, H/P]", hidden // ranks * precision.compute)
    yield from _dropout("attention output", shape.residual_dropout, shape, run)
    yield from _norm("MLP norm", shape, run)
    yield Kept("input of the MLP [B, S, H]", hidden * precision.compute)
    yield Kept("inside the activation [B, S, F/P]", inner * _activation_bytes(shape, run))
    yield Kept("activated [B, S, F/P]", inner * precision.compute)
    yield from _dropout("MLP output", shape.residual_dropout, shape, run)
    if precision.casts_weights:
        yield Kept("16-bit copies of the matrices", shape.layer_matrices(ranks) * precision.compute)


def kept_for_recomputation(shape: ModelShape, run: Run) -> Kept:
    """What a layer keeps where all of it is recomputed: its input [B, S/R, H]."""
    return Kept("layer input [B, S/R, H]", _residual(shape, run) * run.precision.residual)


def kept_by_head(shape: ModelShape, run: Run) -> Iterator[Kept]:
    """From the last layer to the logits, for the positions that are predicted."""
    predicted, compute = run.predicted(shape) * shape.hidden_size, run.precision.compute
    if not _is_post(shape):
        yield from _norm("final norm", shape, run)
    if shape.is_causal:
        yield Kept("input of the head [B, S, H]", run.tokens * shape.hidden_size * compute)
    else:
        if shape.has_pooler:
            yield Kept("input of the pooler [B, S, H]", run.tokens * shape.hidden_size * compute)
            yield Kept("pooled [B, H]", run.micro_batch * shape.hidden_size * compute)
        yield Kept("which positions are labelled", run.tokens * _MASK)
        yield Kept("transform of the labelled positions", predicted * (3 * compute + run.precision.residual))
        yield Kept("its norm's statistics", run.predicted(shape) * _STATISTICS)
    if run.precision.casts_weights and predicted:
        yield Kept("16-bit copy of the embedding", _vocabulary(shape, run) * shape.hidden_size * compute)


def kept_by_loss(shape: ModelShape, run: Run) -> Iterator[Kept]:
    """The softmax in float32, split along the vocabulary, and where its targets are."""
    predicted = run.predicted(shape)
    if predicted:
        yield Kept("softmax [B, S, V/P]", predicted * _vocabulary(shape, run) * 4)
        yield Kept("targets", predicted * (_INDEX + 2 * _MASK))


def _vocabulary(shape: ModelShape, run: Run) -> int:
    """Rows of the largest shard of the vocabulary."""
    return ceil(shape.vocab_size / run.tp_size)


def _is_post(shape: ModelShape) -> bool:
    return shape.table.own_config.get("layernorm_placement") == "post"


def _residual(shape: ModelShape, run: Run) -> int:
    """Elements of the residual stream on one rank: B x S/R x H."""
    return run.tokens * shape.hidden_size // run.region_size


def _norm(name: str, shape: ModelShape, run: Run) -> Iterator[Kept]:
    """Its input; its output is the next product's input."""
    yield Kept(f"input of the {name} [B, S/R, H]", _residual(shape, run) * run.precision.residual)
    yield Kept(f"statistics of the {name}", run.tokens // run.region_size * _STATISTICS)


def _dropout(name: str, p: float, shape: ModelShape, run: Run) -> Iterator[Kept]:
    """On a GPU a mask; on a CPU the factors, 0 or 1/(1-p)."""
    if run.dropout and p > 0:
        size = _MASK if run.device == "cuda" else run.precision.compute
        yield Kept(f"dropout of the {name} [B, S/R, H]", _residual(shape, run) * size)


def _attention(shape: ModelShape, run: Run) -> Iterator[Kept]:
    """What the [S, S] part of attention keeps, split by heads."""
    heads = run.micro_batch * shape.num_heads // run.tp_size
    if not run.keeps_probabilities(shape):
        yield Kept("log-sum-exp of the scores [B, heads/P, S]", heads * run.sequence_length * 4)
        return
    if run.recompute == "selective":
        return
    scores, compute = heads * run.sequence_length**2, run.precision.compute
    # Autocast computes softmax in float32, and what is multiplied is a 16-bit copy.
    softmax_size = 4 if run.precision.name == "amp" else compute
    has_dropout = run.dropout and shape.attention_dropout > 0
    if shape.is_causal and run.attention == "sdpa":
        yield Kept("causal mask [S, S]", run.sequence_length**2 * _MASK)
    yield Kept("attention probabilities [B, heads/P, S, S]", scores * softmax_size)
    if has_dropout:
        yield Kept("dropout of the probabilities", scores * _MASK)
    if has_dropout or softmax_size != compute:
        yield Kept("probabilities as multiplied", scores * compute)


def _activation_bytes(shape: ModelShape, run: Run) -> int:
    """Bytes that the activation function keeps per element of its input."""
    activation, compute = shape.activation, run.precision.compute
    if activation.has_power and run.precision.name == "amp" and run.device == "cuda":
        return compute + (activation.saved - 1) * 4
    return activation.saved * compute
