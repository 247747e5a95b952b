"""Sequence parallelism: activations between the tensor-parallel regions are split along the sequence.

With tensor parallelism alone, norms, dropout and residuals are computed redundantly for all positions on every rank.
With sequence parallelism, each rank stores and computes only its own positions. Parallel regions begin with an
all-gather and end with a reduce-scatter, which together transfer as much data as the all-reduces they replace. Within a
region the sequence is the first dimension: what a collective sends to or takes from one rank is then in one piece, and
needs no copy.

A :class:`SequenceParallelRegion` belongs to one call of a model and is passed down to the layers. Layers without a
region run without sequence parallelism, as for short sequences.

Shapes: B batch, S sequence, S_p this rank's positions of it, H hidden.

Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from hf_megatron.tensor_parallel.group import TensorParallelGroup, local
from hf_megatron.tensor_parallel.mappings import (
    copy_to_tensor_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_parallel_region,
)
from hf_megatron.tensor_parallel.random import sliced_dropout


@dataclass(frozen=True)
class SequenceParallelRegion:
    """Hidden states [S_p, B, H], split on the sequence like ``torch.chunk``; parts may be uneven or empty.

    In the place of B there may be several dimensions.
    """

    group: TensorParallelGroup
    length: int  # S
    shared: Mapping[int, torch.Tensor] = field(default_factory=dict)  # by the parameters' ids, see :meth:`sharing`

    def sharing(self, parameters: Iterable[torch.Tensor]) -> SequenceParallelRegion:
        """The region with the replicated parameters used in it; a block calls this once, for all of them.

        Each rank sees different positions, so the gradients of norms and biases are partial sums. The backward pass
        all-reduces them together, once the last one has been computed.

        Collective: all-reduce over tp, backward, of all of these parameters' gradients.
        """
        parameters = list(parameters)
        copies = copy_to_tensor_parallel_region(self.group, *(local(parameter) for parameter in parameters))
        return replace(self, shared={id(parameter): copy for parameter, copy in zip(parameters, copies, strict=True)})

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Begin: [B, S, H], replicated, to [S_p, B, H].

        Collective: all-gather over tp, backward.
        """
        return scatter_to_tensor_parallel_region(self.group, x.movedim(-2, 0), dim=0)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """End: [S_p, B, H] to [B, S, H], replicated, with a gradient that is the same on all ranks.

        Collective: all-gather over tp, forward.
        """
        return gather_from_tensor_parallel_region(self.group, x, dim=0, size=self.length).movedim(0, -2)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Enter a parallel region: [S_p, B, H] to [S, B, H], replicated, with a gradient that is a partial sum.

        Collective: all-gather over tp, forward; reduce-scatter over tp, backward.
        """
        return gather_from_sequence_parallel_region(self.group, x, dim=0, size=self.length)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Leave a parallel region: partial sums [S, B, H] to [S_p, B, H].

        Collective: reduce-scatter over tp, forward; all-gather over tp, backward.
        """
        return reduce_scatter_to_sequence_parallel_region(self.group, x, dim=0)

    def dropout(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """Dropout on [S_p, B, H] with the mask that the whole sequence would get on one rank."""
        return sliced_dropout(self.group, x.movedim(0, -2), p, dim=-2, size=self.length).movedim(-2, 0)


def in_region(parameter: torch.Tensor, region: SequenceParallelRegion | None) -> torch.Tensor:
    """A replicated parameter as a plain tensor; with a region the copy shared there, whose gradient is summed."""
    return local(parameter) if region is None else region.shared[id(parameter)]
