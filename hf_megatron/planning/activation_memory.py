"""What the forward pass leaves behind for the backward pass: every tensor, by name, as autograd holds it.

Each storage counts once; parameters do not count. A test compares the sums with what autograd really holds.

Shapes: B batch, S sequence, S_p a rank's part of it under sequence parallelism (else all of it), H hidden, F inner, V
vocabulary, P ranks, T predicted positions.

Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4, counts the same tensors for fused kernels in 16 bits:
S B H (34 + 5 heads S / H) bytes per layer on one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from hf_megatron.planning.run import Run
from hf_megatron.planning.shape import ModelShape

# As in hf_megatron.tensor_parallel.linear_cross_entropy, which needs torch.
LOGITS_PER_CHUNK = {"cpu": 2**24, "cuda": 2**26}

_STATISTICS = 2 * 4  # bytes per token: mean and reciprocal deviation of a norm, in float32
_INDEX = 8  # bytes of a token id
_MASK = 1  # bytes of a bool


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that lives until the backward pass, and its bytes on one rank."""

    name: str
    bytes: int


def kept_by_embedding(shape: ModelShape, run: Run) -> Iterator[Kept]:
    """The token ids and positions [B, S], and what comes before the first layer."""
    yield Kept("token ids", run.tokens * _INDEX)
    yield Kept("positions", run.sequence_length * _INDEX)
    if run.tp_size > 1:
        yield Kept("which ids are other ranks'", run.tokens * _MASK)
    # BERT's hidden states are split on the sequence only behind its embeddings.
    where = run if shape.table.is_causal else replace(run, sequence_parallel=False)
    yield from _dropout("embedding", shape.embedding_dropout, shape, where)
    if shape.table.norms == "post":
        yield from _norm("embedding norm", shape, where)


def kept_by_layer(shape: ModelShape, run: Run) -> Iterator[Kept]:
    """One transformer layer, with nothing recomputed but what ``selective`` says."""
    precision, ranks = run.precision, run.tp_size
    local, split = run.local_tokens * shape.hidden_size, run.tokens * shape.hidden_size // ranks
    inner = run.tokens * ceil(shape.intermediate_size / ranks)
    yield from _norm("attention norm", shape, run)
    yield Kept("input of query, key, value [B, S_p, H]", local * precision.compute)
    yield Kept("query, key, value [B, S, 3H/P]", 3 * split * precision.compute)
    yield from _attention(shape, run)
    yield Kept("context [B, S, H/P]", split * precision.compute)
    yield from _dropout("attention output", shape.residual_dropout, shape, run)
    yield from _norm("MLP norm", shape, run)
    yield Kept("input of the MLP [B, S_p, H]", local * precision.compute)
    if shape.keeps_activation_input:
        yield Kept("input of the activation [B, S, F/P]", inner * precision.compute)
    yield Kept("activated [B, S, F/P]", inner * precision.compute)
    yield from _dropout("MLP output", shape.residual_dropout, shape, run)
    if precision.casts_weights:
        yield Kept("16-bit copies of the matrices", shape.layer_matrices(ranks) * precision.compute)


def kept_for_recomputation(shape: ModelShape, run: Run) -> Kept:
    """What a layer keeps where all of it is recomputed: its input [B, S_p, H]."""
    return Kept("layer input [B, S_p, H]", run.local_tokens * shape.hidden_size * run.precision.residual)


def kept_by_head(shape: ModelShape, run: Run) -> Iterator[Kept]:
    """From the last layer to the head's input."""
    hidden, compute = shape.hidden_size, run.precision.compute
    if shape.table.norms == "pre":
        yield from _norm("final norm", shape, run)
    has_pooler, has_transform = has_square_matrices(shape)
    if run.precision.casts_weights:
        yield Kept("16-bit copies of the matrices", (has_pooler + has_transform) * hidden**2 * compute)
    if has_pooler:
        yield Kept("input of the pooler [B, S, H]", run.tokens * hidden * run.precision.residual)
        yield Kept("pooled [B, H]", run.micro_batch * hidden * compute)
    if shape.model_class.is_language_model and not shape.table.is_causal:
        yield Kept("which positions are labelled", run.tokens * _MASK)
    if has_transform:
        predicted = run.predicted(shape)
        # What goes into its linear layer, into its activation and into its norm.
        yield Kept("transform [T, H] x 3", predicted * hidden * (2 * compute + run.precision.residual))
        yield Kept("statistics of its norm", predicted * _STATISTICS)


def kept_by_loss(shape: ModelShape, run: Run) -> Iterator[Kept]:
    """Head and loss are one operation, which computes gradients on the way and keeps them, and no logits."""
    predicted, weight_size = run.predicted(shape), weight_gradient_size(shape, run)
    if predicted:
        rows = vocabulary(shape, run)
        yield Kept("which positions are predicted [T]", predicted * _INDEX)
        yield Kept("gradient of the head's input [T, H]", predicted * shape.hidden_size * run.precision.residual)
        yield Kept("gradient of the head's weight [V/P, H]", rows * shape.hidden_size * weight_size)
        if shape.head_has("vocab_size"):
            yield Kept("gradient of the head's bias [V/P]", rows * weight_size)


def chunk_tokens(shape: ModelShape, run: Run) -> int:
    """Positions whose logits there are at a time."""
    return min(run.predicted(shape), max(1, LOGITS_PER_CHUNK[run.device] // vocabulary(shape, run)))


def weight_gradient_size(shape: ModelShape, run: Run) -> int:
    """Bytes of an element of the head's gradient while it is summed up over chunks: float32, or of one the weight's."""
    is_summed = chunk_tokens(shape, run) < run.predicted(shape)
    return max(run.precision.parameter, 4 if is_summed else 0)


def has_square_matrices(shape: ModelShape) -> tuple[bool, bool]:
    """Whether there is a pooler, and the transform of a masked-LM head, each with a matrix [H, H] held whole."""
    return any(".pooler." in f".{name}" for name in shape.tensors), shape.head_has("hidden_size", "hidden_size")


def vocabulary(shape: ModelShape, run: Run) -> int:
    """Rows of the largest shard of the vocabulary."""
    return ceil(shape.vocab_size / run.tp_size)


def _norm(name: str, shape: ModelShape, run: Run) -> Iterator[Kept]:
    """Its input; its output is the next product's input."""
    yield Kept(f"input of the {name} [B, S_p, H]", run.local_tokens * shape.hidden_size * run.precision.residual)
    yield Kept(f"statistics of the {name}", run.local_tokens * _STATISTICS)


def _dropout(name: str, p: float, shape: ModelShape, run: Run) -> Iterator[Kept]:
    """A mask on a GPU, or of a part of the sequence; otherwise, on a CPU, the factors 0 and 1/(1-p)."""
    if run.dropout and p > 0:
        size = _MASK if run.device == "cuda" or run.sequence_parallel else run.precision.compute
        yield Kept(f"dropout of the {name} [B, S_p, H]", run.local_tokens * shape.hidden_size * size)


def _attention(shape: ModelShape, run: Run) -> Iterator[Kept]:
    """What the [S, S] part of attention keeps, split by heads."""
    heads = run.micro_batch * run.heads(shape)
    if not run.keeps_probabilities(shape):
        yield Kept("log-sum-exp of the scores [B, heads/P, S]", heads * run.sequence_length * 4)
        return
    if run.recompute == "selective":
        return
    scores, compute = heads * run.sequence_length**2, run.precision.compute
    # Autocast computes softmax in float32, and what is multiplied is a 16-bit copy.
    softmax_size = 4 if run.precision.name == "amp" else compute
    has_dropout = run.dropout and shape.attention_dropout > 0
    if shape.table.is_causal and run.attention == "sdpa":
        yield Kept("causal mask [S, S]", run.sequence_length**2 * _MASK)
    yield Kept("attention probabilities [B, heads/P, S, S]", scores * softmax_size)
    if has_dropout:
        yield Kept("dropout of the probabilities", scores * _MASK)
    if has_dropout or softmax_size != compute:
        yield Kept("probabilities as multiplied", scores * compute)
