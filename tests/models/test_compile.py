"""Compiled models against eager ones, in training and in inference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hf_megatron import MegatronBertConfig, MegatronBertForMaskedLM, MegatronGPT2Config, MegatronGPT2LMHeadModel
from tests.models.reference import Pool, assert_agrees, full_gradients, layout, run_at
from tests.tiers import quick

V, S = 131, 16


def _model(architecture: str, tp_size: int, dropout: float) -> Any:
    if architecture == "gpt2":
        config = MegatronGPT2Config(
            vocab_size=V,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=S,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
        )
        return MegatronGPT2LMHeadModel.from_config(config, distributed_config=layout(tp_size), seed=0).double()
    config = MegatronBertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=S,
        attention_probs_dropout_prob=dropout,
        hidden_dropout_prob=dropout,
    )
    return MegatronBertForMaskedLM.from_config(config, distributed_config=layout(tp_size), seed=0).double()


def _compare(architecture: str, tp_size: int, dropout: float, backend: str, recompute: str | None) -> None:
    torch.compiler.reset()
    model = _model(architecture, tp_size, dropout)
    if recompute is not None:
        model.config.use_cache = False  # else transformers warns that it turns it off, and that breaks the graph
        model.activation_checkpointing_enable({"recompute": recompute})
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend, options=options)
    ids = torch.arange(2 * S).view(2, S)
    labels = torch.where(ids % 3 == 0, ids, -100)
    results = []
    for forward in (model, compiled):
        torch.manual_seed(3)
        model.train().zero_grad()
        loss = forward(input_ids=ids, labels=labels).loss
        loss.backward()
        gradients = full_gradients(model)
        with torch.no_grad():
            logits = forward.eval()(input_ids=ids).logits
        results.append((loss.detach(), gradients, logits))
    (loss, gradients, logits), (compiled_loss, compiled_gradients, compiled_logits) = results
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_logits, logits)
    assert compiled_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_agrees(f"gradient of {name}", compiled_gradients[name], gradient, 1e-3)


# The compiler uses parts of torch that torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("tp_size", "architecture", "backend", "recompute"),
    quick(
        [
            *itertools.product((1, 2), ("gpt2", "bert"), ("aot_eager",), (None,)),
            *itertools.product((1, 2), ("gpt2",), ("aot_eager",), ("selective",)),
            *itertools.product((1, 2), ("bert",), ("inductor",), ("selective",)),
            (2, "gpt2", "inductor", None),
            (1, "bert", "inductor", None),
        ],
        [(2, "gpt2", "aot_eager", None)],
    ),
)
def test_a_model_is_one_graph_that_equals_eager(
    pool: Pool, tp_size: int, architecture: str, backend: str, recompute: str | None
) -> None:
    """Catches a graph break anywhere in a model, and a compiled step with other masks, loss, gradients or logits.

    aot_eager finds everything that does not trace, forward and backward; inductor also generates code.
    """
    run_at(pool, tp_size, _compare, architecture, tp_size, 0.1, backend, recompute, timeout=280)
