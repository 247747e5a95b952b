"""What one process computes can be compiled as one graph: no layer falls back to Python in the middle of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_megatron.tensor_parallel import SINGLE, VocabParallelEmbedding, attention_dropout, vocab_parallel_cross_entropy
from tests.tensor_parallel.test_linear import Mlp

IDS = torch.tensor([[0, 7, 3, 12], [12, 1, 7, 5]])


class Model(nn.Module):
    """Every layer once, dropout per head in between, and the loss at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding(13, 6)
        self.mlp = Mlp()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.mlp(self.embedding(ids))
        heads = hidden.unflatten(-1, (3, 2)).transpose(1, 2)
        hidden = attention_dropout(heads, 0.5, 0).transpose(1, 2).flatten(2)
        logits = (hidden @ self.embedding.weight.t()).flatten(0, 1)
        return vocab_parallel_cross_entropy(SINGLE, logits, ids.flatten(), vocab_size=13, label_smoothing=0.1)


def _step(model: nn.Module, forward: object) -> tuple[torch.Tensor, list[torch.Tensor]]:
    assert callable(forward)
    torch.manual_seed(4)
    loss = forward(IDS)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), list(gradients)


# The compiler uses parts of torch that torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# aot_eager finds everything that does not trace, forward and backward; inductor needs a C++ compiler and more time.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_layers_dropout_and_loss_compile_as_one_graph(backend: str) -> None:
    """Catches a graph break, and a compiled step whose masks, loss or gradients are others than those of eager."""
    torch.manual_seed(0)
    model = Model().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    expected_loss, expected_gradients = _step(model, model)
    # Inductor has a random stream of its own, unless it is told to draw as eager does.
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    torch.compiler.reset()
    loss, gradients = _step(model, torch.compile(model, fullgraph=True, backend=backend, options=options))
    torch.testing.assert_close(loss, expected_loss)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected)
