"""A word embedding that shares its weight's gradient with a head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_megatron.tensor_parallel import VocabParallelEmbedding, local
from tests.tensor_parallel.ranks import assert_close

V, H, PADDING = 13, 6, 3
IDS = torch.tensor([[0, 7, PADDING, 12], [12, 7, 7, 5]])  # some of them several times

Use = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _both(embedded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(embedded.sin(), weight).square().sum()


def _only_lookups(embedded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return embedded.square().sum()


def _only_head(embedded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(embedded.detach(), weight).square().sum()


def _embedding(padding: int | None = None) -> VocabParallelEmbedding:
    torch.manual_seed(0)
    return VocabParallelEmbedding(V, H, padding_idx=padding).double()


def _gradient(embedding: VocabParallelEmbedding, use: Use, is_shared: bool) -> torch.Tensor:
    with embedding.sharing_gradient() if is_shared else nullcontext(local(embedding.weight)) as weight:
        embedded = embedding(IDS)
    use(embedded, weight).backward()
    assert embedding.weight.grad is not None
    return embedding.weight.grad


@pytest.mark.parametrize("use", [_both, _only_lookups, _only_head])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_gradient_is_that_of_two(use: Use, padding: int | None) -> None:
    """Catches tokens that occur twice counted once, a padding row that learns, and one of two gradients lost."""
    expected = _gradient(_embedding(padding), use, is_shared=False)
    actual = _gradient(_embedding(padding), use, is_shared=True)
    assert actual.layout == torch.strided
    assert_close(actual, expected)


class _Whole(TorchDispatchMode):
    """Counts the tensors as large as the weight that operations make; views and sums in place make none."""

    count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_new = all(returned.alias_info is None for returned in func._schema.returns)
        self.count += is_new and isinstance(out, torch.Tensor) and out.numel() == V * H and not out.is_sparse
        return out


def _num_whole(is_shared: bool) -> int:
    embedding, whole = _embedding(), _Whole()
    with whole:
        _gradient(embedding, _both, is_shared)
    return whole.count


def test_no_second_gradient_is_made() -> None:
    """Catches a whole gradient for the lookups, and a sum that does not happen in place."""
    assert _num_whole(is_shared=False) > 1
    assert _num_whole(is_shared=True) == 1


def test_afterwards_lookups_are_ordinary() -> None:
    """Catches rows of one step that are looked up in the next, and an error that leaves them behind."""
    embedding = _embedding()
    with pytest.raises(ValueError, match="in between"), embedding.sharing_gradient():
        raise ValueError("in between")
    with torch.no_grad():
        embedding.weight.zero_()
    assert not embedding(IDS).any()
