"""Vocabulary-parallel word embedding.

Shapes: B batch, S sequence, H hidden, V vocabulary; V_p is this rank's part of it.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from hf_megatron.partition import Spec, VocabSplit, chunk_range
from hf_megatron.tensor_parallel.cpu import TiedGradient
from hf_megatron.tensor_parallel.group import local
from hf_megatron.tensor_parallel.mappings import reduce_from_tensor_parallel_region
from hf_megatron.tensor_parallel.parallel_module import ParallelModule


class VocabParallelEmbedding(ParallelModule, nn.Embedding):
    """Embedding split by rows (the vocabulary): each rank looks up its own tokens, and an all-reduce adds the results.

    ``num_embeddings`` and ``padding_idx`` are global. Only the rank that holds the padding row freezes it, and tokens
    of other ranks must not contribute to its gradient.
    """

    def partition_specs(self) -> Mapping[str, Spec]:
        return {"weight": VocabSplit()}

    def forward(self, input_ids: torch.Tensor | None = None, tied: TiedGradient | None = None) -> torch.Tensor:
        """Global token ids [B, S] to [B, S, H], both replicated.

        Without ids it is the weight itself, [V, H], split on dim 0, for a tied head: hooks that bring weights when they
        are needed work on calls. ``tied`` looks the words up instead, on a CPU, and adds their gradient to that of a
        head with the same weight.

        Collective: all-reduce over tp, forward, of the output.
        """
        if input_ids is None:
            return self.weight
        group = self.tp_group
        if group.size == 1:
            return self._look_up(input_ids, self.padding_idx, tied)
        start, stop = chunk_range(self.num_embeddings, group.size, group.rank)
        self._check_range(input_ids)
        is_mine = (input_ids >= start) & (input_ids < stop)
        padding = self.padding_idx
        local_padding = padding - start if padding is not None and start <= padding < stop else None
        embedded = self._look_up(torch.where(is_mine, input_ids - start, 0), local_padding, tied)
        # Row 0 is the placeholder for tokens of other ranks; zeroing the output also zeroes its gradient for them.
        partial_sum = embedded.masked_fill(~is_mine[..., None], 0.0)
        return reduce_from_tensor_parallel_region(group, partial_sum, in_place=True)

    def shared_weight(self) -> torch.Tensor:
        """The weight for a tied head, a plain tensor [V_p, H], split on dim 0."""
        # accelerate loads offloaded weights only while their module is called.
        return local(self() if hasattr(self, "_hf_hook") else self.weight)

    def _look_up(self, rows: torch.Tensor, padding: int | None, tied: TiedGradient | None) -> torch.Tensor:
        return F.embedding(rows, local(self.weight), padding) if tied is None else tied.look_up(rows, padding)

    def _check_range(self, input_ids: torch.Tensor) -> None:
        # An id outside of the vocabulary belongs to no shard and would silently embed as zero.
        if not are_in_range(input_ids, self.num_embeddings, "a token id is outside of the vocabulary"):
            raise IndexError(
                f"token ids from {int(input_ids.min())} to {int(input_ids.max())} were given, but the embedding has "
                f"{self.num_embeddings} rows; check that the tokenizer belongs to this model."
            )


def are_in_range(ids: torch.Tensor, size: int, message: str) -> bool:
    """Whether all ids, of any shape, are from 0 to below ``size``.

    Reading that back would stall an accelerator, and a compiled graph cannot branch, so there the device fails instead,
    later, and the answer is True.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(((ids >= 0) & (ids < size)).all(), message)
    elif ids.is_cpu:
        return not ids.numel() or 0 <= int(ids.min()) <= int(ids.max()) < size
    else:  # one kernel, which checks each index, in a table that takes no memory
        torch.empty(1, dtype=torch.bool, device=ids.device).expand(size).gather(0, ids.reshape(-1))
    return True
