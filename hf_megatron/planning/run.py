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
    """In what formats numbers are kept, in bytes each.

    Attributes:
        name: What to call it by.
        meaning: In a few words.
        parameter: A weight.
        gradient: Its gradient.
        optimizer: Adam's two averages, and a copy of the weight in float32 where there is one.
        compute: Operands and results of matrix products.
        residual: The residual stream, and what the norms read.
        casts_weights: Whether the forward pass makes 16-bit copies of the matrices, which live until the backward.
    """

    name: str
    meaning: str
    parameter: int
    gradient: int
    optimizer: int
    compute: int
    residual: int
    casts_weights: bool = False


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
    """One training run.

    Attributes:
        micro_batch: B, sequences a rank computes at a time.
        sequence_length: S.
        accumulation: Micro-batches per optimizer step.
        tp_size: Tensor-parallel degree P.
        dp_size: Data-parallel degree.
        fsdp: Whether the data-parallel ranks share parameters, gradients and optimizer among them (FSDP2), rather than
            each holding all of them.
        sequence_parallel: Whether what tensor parallelism replicates is split along the sequence.
        recompute: What is computed again in the backward pass rather than kept: nothing, the attention between its
            projections (``selective``; Korthikanti et al. 2022, arXiv:2205.05198), or whole layers (``full``).
        attention: ``eager`` keeps the [S, S] probabilities, ``sdpa`` is a fused kernel that does not.
        precision: See :data:`PRECISIONS`.
        dropout: Whether the configuration's dropout is on.
        overlap: Whether the sums of input gradients travel while weight gradients are computed, as in this package.
        labelled: Share of the positions that BERT predicts.
        device: ``cuda`` or ``cpu``. On a CPU dropout keeps numbers rather than a mask, and a fused attention kernel
            without dropout only.
    """

    micro_batch: int = 1
    sequence_length: int = 1024
    accumulation: int = 1
    tp_size: int = 1
    dp_size: int = 1
    fsdp: bool = False
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    attention: Literal["eager", "sdpa"] = "sdpa"
    precision: Precision = PRECISIONS["amp"]
    dropout: bool = True
    overlap: bool = True
    labelled: float = 0.15
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
        """Refuse what the models refuse.

        Raises:
            PartitionError: A size or degree that does not fit the model.
            UnsupportedError: A sequence longer than the model has positions.
        """
        for name in ("micro_batch", "sequence_length", "accumulation", "tp_size", "dp_size"):
            if getattr(self, name) < 1:
                raise PartitionError(f"{name}={getattr(self, name)} is not a size; choose 1 or more.")
        shape.table.check_degree(shape.config, self.tp_size)
        if self.sequence_length > shape.num_positions:
            raise UnsupportedError(
                f"sequence_length={self.sequence_length} is longer than the model's {shape.num_positions} positions."
            )
