"""Replicated layers: no communication, for replicated or sequence-parallel activations.

Shapes: ``in`` and ``out`` are full sizes; H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hf_megatron.tensor_parallel.group import local, local_all
from hf_megatron.tensor_parallel.parallel_module import ParallelModule
from hf_megatron.tensor_parallel.sequence_parallel import SequenceParallelRegion, in_region


def _local_parameters(
    module: nn.Linear | nn.LayerNorm, region: SequenceParallelRegion | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A module's weight and bias as plain tensors, or the copies of a region, whose gradients are summed."""
    weight, bias = module.weight, module.bias
    if region is not None:
        return in_region(weight, region), None if bias is None else in_region(bias, region)
    if bias is None:
        return local(weight), None
    local_weight, local_bias = local_all(weight, bias)
    return local_weight, local_bias


class ReplicatedLinear(ParallelModule, nn.Linear):
    """Replicated ``nn.Linear`` for small heads. Input and output are replicated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], both replicated, without communication."""
        return F.linear(x, *_local_parameters(self))


class ReplicatedEmbedding(ParallelModule, nn.Embedding):
    """Replicated ``nn.Embedding`` for positions and token types."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[...] ids to [..., H], both replicated, without communication."""
        return F.embedding(input_ids, local(self.weight), self.padding_idx)


class ReplicatedLayerNorm(ParallelModule, nn.LayerNorm):
    """Replicated ``nn.LayerNorm``."""

    def forward(self, x: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """[..., H] to [..., H], both replicated or, with a region, both split on the sequence; no communication."""
        weight, bias = _local_parameters(self, region)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class HiddenDropout(nn.Dropout):
    """``nn.Dropout`` on hidden states; the mask is the same whether they are replicated or split on the sequence."""

    def forward(self, x: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """[..., H] to [..., H], both replicated or, with a region, both split on the sequence; no communication."""
        if region is None or not self.training or not self.p:
            return super().forward(x)
        return region.dropout(x, self.p)
