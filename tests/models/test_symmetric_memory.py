"""Products in one operation with their collectives, by the plain functions that torch has for what is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import _symmetric_memory as of_torch

from hf_megatron.tensor_parallel import symmetric_memory
from tests.live import on_live_ranks
from tests.models.architectures import ARCHITECTURES, GPT2, ModelCase, StockDir
from tests.models.reference import assert_agrees, assert_all_agree, gradients


@contextmanager
def _used_on_a_cpu(names: list[str]) -> Iterator[None]:
    """Without the check for a GPU; ``names`` receives those of the operations."""

    def is_used(group: object, x: torch.Tensor, length: int) -> bool:
        return length % torch.distributed.get_world_size() == 0

    def gather(*args: object, **options: object) -> object:
        names.append("gather")
        return of_torch._fused_all_gather_matmul_fallback(*args, **options)  # type: ignore[arg-type]

    def scatter(*args: object) -> torch.Tensor:
        names.append("scatter")
        return of_torch._fused_matmul_reduce_scatter_fallback(*args)  # type: ignore[arg-type]

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", gather, "CPU")
    library.impl("fused_matmul_reduce_scatter", scatter, "CPU")
    try:
        with mock.patch.object(symmetric_memory, "is_used", is_used):
            yield
    finally:
        library._destroy()


@pytest.mark.parametrize("trained", ["", "bias"])
@pytest.mark.parametrize("case", ARCHITECTURES)
@pytest.mark.parametrize("world_size", [2, 3])
@on_live_ranks()
def test_loss_and_gradients(stock_dir: StockDir, case: ModelCase, trained: str, world_size: int) -> None:
    """Catches a matrix the wrong way round, a bias added on each rank, and its gradient of one rank's positions."""
    model = case.load(stock_dir(case), world_size, sequence_parallel=True, dtype=torch.float64).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    operations: list[str] = []
    found = []
    for context in (nullcontext(), _used_on_a_cpu(operations)):
        model.zero_grad()
        with context:
            loss = model(**case.batch(None, "none", 6)).loss
            loss.backward()
        found.append((loss.detach(), gradients(model)))
    layers = model.config.num_hidden_layers
    assert operations[: 4 * layers] == ["gather", "scatter"] * 2 * layers, operations
    assert len(operations) == 8 * layers, operations
    assert_agrees("loss", found[1][0], found[0][0])
    assert_all_agree("gradient", found[1][1], found[0][1])


@on_live_ranks(2)
def test_autocast_and_uneven_sequences(stock_dir: StockDir) -> None:
    """Catches products in float32 where autocast asks for less, and a sequence cut into unequal parts."""
    model = GPT2.load(stock_dir(), 2, sequence_parallel=True).train()
    losses, operations = [], list[str]()
    for length in (8, 9):
        for context in (nullcontext(), _used_on_a_cpu(operations)):
            with context, torch.autocast("cpu", torch.bfloat16):
                losses.append(model(**GPT2.batch(None, "none", length)).loss.item())
    assert len(operations) == 4 * model.config.num_hidden_layers, operations
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[3] == losses[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler uses parts of torch that torch deprecates
@on_live_ranks(2, timeout=280)
def test_one_graph(stock_dir: StockDir) -> None:
    """Catches an operation that a compiler does not trace, forward or backward."""
    model = GPT2.load(stock_dir(), 2, sequence_parallel=True, dtype=torch.float64).train()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    operations: list[str] = []
    found = []
    for forward in (model, compiled):
        model.zero_grad()
        with _used_on_a_cpu(operations):
            loss = forward(**GPT2.batch(None, "none", 8)).loss
            loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert operations.count("scatter") == 8 * model.config.num_hidden_layers
    assert_agrees("loss", found[1][0], found[0][0])
    assert_all_agree("gradient", found[1][1], found[0][1])
