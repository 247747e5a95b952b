"""What the jobs on the ranks, and the tests that start them, share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_megatron.tensor_parallel import TensorParallelGroup
from tests.distributed import RankPool

Pool = Callable[[int], RankPool]

TP_SIZES = [1, 2, 4]


def mesh() -> DeviceMesh:
    """Inside a job: all ranks as one mesh."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def group() -> TensorParallelGroup:
    """Inside a job: all ranks as one tensor-parallel group."""
    return TensorParallelGroup.from_mesh(mesh())


def proven(is_defective: bool) -> AbstractContextManager[object]:
    """Around a check that runs on a correct form and on a defective one: it must hold for one and fail for the other.

    Without the second, a check that cannot fail would look like one that finds nothing wrong.
    """
    return pytest.raises(AssertionError) if is_defective else nullcontext()


def same_on_all_ranks(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The value of a replicated tensor, which every rank must hold to the last bit."""
    for value in values[1:]:
        assert torch.equal(value, values[0])
    return values[0]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Equal relative to the largest value; the default allows float64 nothing but another order of summation."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * max(scale, 1e-30))
