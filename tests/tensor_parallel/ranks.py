"""What the jobs on the ranks, and the tests that start them, share."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_megatron.tensor_parallel import SINGLE, TensorParallelGroup
from tests.models.reference import Pool as Pool

TP_SIZES = [1, 2, 4]


def mesh() -> DeviceMesh:
    """Inside a job: all ranks as one mesh."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def group() -> TensorParallelGroup:
    """Inside a job: all ranks as one tensor-parallel group. Elsewhere that of one process."""
    return TensorParallelGroup.from_mesh(mesh()) if dist.is_initialized() else SINGLE


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


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
