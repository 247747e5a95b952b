"""Replicated layers: no communication, for replicated or sequence-parallel activations.

Shapes: ``in`` and ``out`` are full sizes; H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hf_megatron.tensor_parallel.group import local
from hf_megatron.tensor_parallel.parallel_module import ParallelModule
from hf_megatron.tensor_parallel.sequence_parallel import SequenceParallelRegion, in_region


class ReplicatedLinear(ParallelModule, nn.Linear):
    """Replicated ``nn.Linear`` for small heads. Input and output are replicated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], both replicated, without communication."""
        return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))


class ReplicatedEmbedding(ParallelModule, nn.Embedding):
    """Replicated ``nn.Embedding`` for positions and token types."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[...] ids to [..., H], both replicated, without communication."""
        return F.embedding(input_ids, local(self.weight), self.padding_idx)


class ReplicatedLayerNorm(ParallelModule, nn.LayerNorm):
    """Replicated ``nn.LayerNorm``."""

    def forward(self, x: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """[..., H] to [..., H], both replicated or, with a region, both split on the sequence; no communication."""
        bias = None if self.bias is None else in_region(self.bias, region)
        return F.layer_norm(x, self.normalized_shape, in_region(self.weight, region), bias, self.eps)


class HiddenDropout(nn.Dropout):
    """``nn.Dropout`` on hidden states; the mask is the same whether they are replicated or split on the sequence."""

    def forward(self, x: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """[..., H] to [..., H], both replicated or, with a region, both split on the sequence; no communication."""
        if region is None or not self.training or not self.p:
            return super().forward(x)
        return region.dropout(x, self.p)
