"""How a model is trained: the layout over ranks, the batch, the precision, and what is recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from hf_megatron.errors import PartitionError, UnsupportedError
from hf_megatron.planning.shape import ModelShape

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True)
class Precision:
    """In what formats numbers are kept, in bytes each."""

    name: str
    meaning: str  # in a few words
    parameter: int
    gradient: int
    optimizer: int  # Adam's two averages, and a copy of the weight in float32 where there is one
    compute: int  # operands and results of matrix products
    residual: int  # the residual stream, and what the norms read
    casts_weights: bool = False  # whether the forward pass makes 16-bit copies of the matrices, for the backward too


PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", "everything in float32", 4, 4, 8, 4, 4),
        Precision("amp", "float32 weights, 16-bit autocast (Trainer's bf16=True)", 4, 4, 8, 2, 4, casts_weights=True),
        Precision("bf16", "weights, gradients and Adam's averages in 16 bits (dtype=torch.bfloat16)", 2, 2, 4, 2, 2),
        Precision("master", "16-bit weights and gradients, float32 copy and averages (Megatron-LM's)", 2, 2, 12, 2, 2),
    )
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    micro_batch: int = 1  # B, sequences a rank computes at a time
    sequence_length: int = 1024  # S
    accumulation: int = 1  # micro-batches per optimizer step
    tp_size: int = 1  # P
    dp_size: int = 1
    fsdp: bool = False  # whether data-parallel ranks share parameters, gradients and optimizer (FSDP2), or each has all
    sequence_parallel: bool = False  # whether what tensor parallelism replicates is split along the sequence
    # What is computed again in the backward pass rather than kept: nothing, the attention between its projections
    # ("selective"; Korthikanti et al. 2022, arXiv:2205.05198), or whole layers.
    recompute: Recompute = "none"
    attention: Literal["eager", "sdpa"] = "sdpa"  # eager keeps the [S, S] probabilities, sdpa is a fused kernel
    precision: Precision = PRECISIONS["amp"]
    dropout: bool = True  # whether the configuration's dropout is on
    overlap: bool = True  # whether sums of input gradients travel while weight gradients are computed, as here
    labelled: float = 0.15  # share of the positions that a masked language model predicts
    # On a CPU dropout keeps numbers rather than a mask, and attention is a fused kernel without dropout only.
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def tokens(self) -> int:
        """B x S."""
        return self.micro_batch * self.sequence_length

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.tp_size * self.dp_size

    @property
    def local_tokens(self) -> int:
        """B x S_p, the positions a rank keeps outside of tensor-parallel regions: all, or its part of the sequence."""
        ranks = self.tp_size if self.sequence_parallel else 1
        return self.micro_batch * ceil(self.sequence_length / ranks)

    def heads(self, shape: ModelShape) -> int:
        """Heads of the rank that computes most of them."""
        return max(len(shape.head_cut(self.tp_size, rank).heads) for rank in range(self.tp_size))

    def keeps_probabilities(self, shape: ModelShape) -> bool:
        """Whether attention is written out, with its [S, S] probabilities in memory."""
        has_dropout = self.dropout and shape.attention_dropout > 0
        return self.attention == "eager" or (self.device == "cpu" and has_dropout)

    def predicted(self, shape: ModelShape) -> int:
        """Number of positions whose logits a micro-batch takes: GPT-2's but the last ones, BERT's labelled ones."""
        if not shape.model_class.is_language_model:
            return 0
        return self.tokens - self.micro_batch if shape.table.is_causal else round(self.labelled * self.tokens)

    def check(self, shape: ModelShape) -> None:
        """Raise PartitionError for a size or degree that does not fit, UnsupportedError for a sequence too long."""
        for name in ("micro_batch", "sequence_length", "accumulation", "tp_size", "dp_size"):
            if getattr(self, name) < 1:
                raise PartitionError(f"{name}={getattr(self, name)} is not a size; choose 1 or more.")
        shape.table.check_degree(shape.config, self.tp_size)
        if self.sequence_length > shape.num_positions:
            raise UnsupportedError(
                f"sequence_length={self.sequence_length} is longer than the model's {shape.num_positions} positions."
            )
