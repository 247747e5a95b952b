"""Compiled models against eager ones, in training and in inference."""

from typing import Any
from unittest import mock

import pytest
import torch

from tests.live import on_live_ranks
from tests.models.architectures import ARCHITECTURES, GPT2, ModelCase
from tests.models.reference import assert_agrees, gradients
from tests.tiers import cases

BERT = ARCHITECTURES[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler uses parts of torch that torch deprecates
@cases(
    "case, tp_size, backend, recompute, splits, heads",
    [
        *((case, tp_size, "aot_eager", None, False, 12) for case in (GPT2, BERT) for tp_size in (1, 2)),
        *((GPT2, tp_size, "aot_eager", "selective", False, 12) for tp_size in (1, 2)),
        *((BERT, tp_size, "inductor", "selective", False, 12) for tp_size in (1, 2)),
        (GPT2, 2, "inductor", None, False, 12),
        (BERT, 1, "inductor", None, False, 12),
        (GPT2, 2, "aot_eager", None, True, 12),
        *((case, 2, "aot_eager", None, False, 3) for case in (GPT2, BERT)),  # a head on two ranks
        (GPT2, 2, "inductor", None, False, 3),
    ],
    [(GPT2, 2, "aot_eager", None, False, 12)],
)
@on_live_ranks(timeout=280)
def test_a_model_is_one_graph_that_equals_eager(
    case: ModelCase, tp_size: int, backend: str, recompute: str | None, splits: bool, heads: int
) -> None:
    """Catches a graph break anywhere in a model, and a compiled step with other masks, loss, gradients or logits.

    aot_eager finds everything that does not trace, forward and backward; inductor also generates code.
    """
    torch.compiler.reset()
    config = case.config(hidden_size=24, num_attention_heads=heads, **case.dropout(0.1, 0.1))
    split = {"tp_size": tp_size, "enable_sequence_parallel": splits} if tp_size > 1 else None
    model = case.ours(case.language_model).from_config(config, distributed_config=split, seed=0).double()
    if recompute is not None:
        model.config.use_cache = False  # else transformers warns that it turns it off, and that breaks the graph
        model.activation_checkpointing_enable({"recompute": recompute})
    model.fuses_head_and_loss = tp_size > 1
    # Inductor has a random stream of its own, unless it is told to draw as eager does.
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend, options=options)
    batch = {**case.batch(case.language_model, "none"), "label_smoothing": 0.1}
    results = []
    for forward in (model, compiled):
        torch.manual_seed(3)
        model.train().zero_grad()
        loss = forward(**batch).loss
        loss.backward()
        found = gradients(model)
        with torch.no_grad():
            evaluated = forward.eval()(**batch)
        results.append(((loss.detach(), evaluated.loss, evaluated.logits), found))
    (outputs, expected), (compiled_outputs, found) = results
    torch.testing.assert_close(compiled_outputs, outputs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_agrees(f"gradient of {name}", found[name], gradient, 1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("case", [GPT2, BERT])
@on_live_ranks(timeout=280)
def test_dropout_of_fused_kernels_is_in_the_graph(case: ModelCase, tp_size: int, padding: str) -> None:
    """Catches a graph that breaks where a rank draws masks of its own, and other masks in its backward pass.

    CPUs have no such kernels; here those that they have are taken for them.
    """
    torch.compiler.reset()
    config = case.config(hidden_size=24, num_hidden_layers=2, **case.dropout(0.2, 0.1))
    split = {"tp_size": tp_size} if tp_size > 1 else None
    model = case.ours(case.language_model).from_config(config, distributed_config=split, seed=0).double().train()
    model.fuses_head_and_loss = tp_size > 1
    batch = case.batch(case.language_model, padding)
    results = []
    with mock.patch("hf_megatron.models.attention._has_fused_dropout", lambda _: True):  # noqa: PT008 (a mock cannot be compiled)
        for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(3)
            model.zero_grad()
            loss = forward(**batch).loss
            loss.backward()
            results.append((loss.detach(), gradients(model)))
    (loss, expected), (compiled_loss, found) = results
    torch.testing.assert_close(compiled_loss, loss)
    for name, gradient in expected.items():
        assert_agrees(f"gradient of {name}", found[name], gradient, 1e-3)
