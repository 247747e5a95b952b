"""A large gradient's memory from one step to the next."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.tensor_parallel import SINGLE, ReusedMemory, vocab_parallel_linear_cross_entropy

T, H, V = 12, 8, 31


def _step(hidden: torch.Tensor, weight: torch.Tensor, memory: ReusedMemory | None, chunk_size: int = T) -> torch.Tensor:
    """Adds to the weight's gradient; the loss."""
    target = torch.arange(T) % V
    loss = vocab_parallel_linear_cross_entropy(
        SINGLE, hidden, weight, None, target, vocab_size=V, chunk_size=chunk_size, memory=memory
    )
    loss.backward()
    return loss.detach()


def _taken(weight: torch.Tensor) -> torch.Tensor:
    """The gradient, which the weight loses."""
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    return gradient


def _leaves(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(T, H, dtype=dtype), torch.randn(V, H, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("chunk_size", [T, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_bit_changes(dtype: torch.dtype, chunk_size: int) -> None:
    """Catches what is left of an earlier gradient in a later one."""
    hidden, weight = _leaves(dtype)
    memory = ReusedMemory()
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(3):
        for m in (None, memory):
            loss = _step(hidden, weight, m, chunk_size)
            found.append((loss, _taken(weight).clone()))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_a_gradient_that_was_dropped_makes_room_for_the_next() -> None:
    """Catches memory that is asked for anew in every step, which is all that this is there to prevent."""
    hidden, weight = _leaves()
    memory = ReusedMemory()
    kept: list[torch.Tensor | None] = []
    for _ in range(3):
        _step(hidden, weight, memory)
        kept.append(memory._last)
        assert kept[0] is not None
        assert _taken(weight).data_ptr() == kept[0].data_ptr()
    assert kept[2] is kept[1] is kept[0]


def test_a_head_keeps_it_until_it_computes_logits() -> None:
    """Catches a head that asks for memory in every step, and one that holds on to it when training is over."""
    config = MegatronGPT2Config(vocab_size=V, n_embd=H, n_layer=1, n_head=2, n_positions=T)
    model: Any = MegatronGPT2LMHeadModel(config)
    ids = torch.arange(T)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    kept = model.lm_head._gradient_memory._last
    assert kept.data_ptr() == model.transformer.wte.weight.grad.data_ptr()
    model.eval()(input_ids=ids)
    assert model.lm_head._gradient_memory._last is None


def test_a_gradient_that_is_there_is_left_alone() -> None:
    """Catches memory that is given out twice: accumulated gradients, kept ones, and two losses before one backward."""
    hidden, weight = _leaves()
    memory = ReusedMemory()
    _step(hidden, weight, None)
    once = _taken(weight)
    for times in (1, 2, 3):
        _step(hidden, weight, memory)
        torch.testing.assert_close(weight.grad, times * once)
    kept = _taken(weight)[:2].numpy()  # which keeps the memory, but not the tensor
    before = kept.copy()
    target = torch.zeros(T, dtype=torch.long)
    losses = [
        vocab_parallel_linear_cross_entropy(SINGLE, hidden, weight, None, t, vocab_size=V, memory=memory)
        for t in (torch.arange(T), target)
    ]
    losses[0].backward()
    torch.testing.assert_close(weight.grad, once)
    assert (kept == before).all()


def test_a_copy_has_memory_of_its_own() -> None:
    """Catches models that are copied and saved together with a gradient."""
    memory = ReusedMemory()
    memory.empty(torch.Size((2, 3)), torch.float32)
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert other._last is None
    assert memory._last is not None
