"""Planned bytes are measured bytes: weights, gradients and Adam's state exactly, activations within 2%."""

import itertools
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from hf_megatron.planning import PRECISIONS, activation_memory, plan_memory
from hf_megatron.planning.activation_memory import kept_by_layer, kept_by_loss
from hf_megatron.planning.run import Recompute
from hf_megatron.tensor_parallel import linear_cross_entropy
from tests.models.reference import Pool, run_at
from tests.planning.models import KINDS, forward, local, make_model, make_run, make_shape, num_bytes
from tests.tiers import cases


def _measure_state(kind: str, tp_size: int, precision: str) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and Adam's state on this rank after one step."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = make_model(kind, tp_size, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    forward(model, kind).loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    gradients = sum(num_bytes(p.grad) for p in parameters if p.grad is not None)
    states = sum(num_bytes(value) for state in optimizer.state.values() for value in state.values())
    return sum(map(num_bytes, parameters)), gradients, states


@cases(
    "precision, kind, tp_size",
    itertools.product(("fp32", "bf16"), ("gpt2", "gpt2-inner", "bert-pre", "bert-mlm"), (1, 2, 4)),
    [
        ("fp32", "gpt2", 1),
        ("bf16", "gpt2", 2),
        ("fp32", "gpt2-inner", 4),
        ("bf16", "bert-pre", 4),
        ("fp32", "bert-mlm", 2),
    ],
)
def test_weights_gradients_and_optimizer(kind: str, precision: str, tp_size: int, pool: Pool) -> None:
    """Catches a tensor that is counted as cut and is not, uneven shards, and state that Adam keeps besides."""
    planned = plan_memory(make_shape(kind), make_run(tp_size=tp_size, precision=PRECISIONS[precision]))
    measured = run_at(pool, tp_size, _measure_state, kind, tp_size, precision)[0]
    assert (planned.parameters, planned.gradients, planned.optimizer) == measured


def _measure_activations(kind: str, tp_size: int, dropout: float, recompute: str, options: dict[str, Any]) -> int:
    """Bytes of the storages that autograd holds at the end of a forward pass, without parameters and buffers."""
    model = make_model(kind, tp_size, dropout=dropout, **options)
    if recompute != "none":
        model.activation_checkpointing_enable({"recompute": recompute})
    own = {local(tensor).untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = local(tensor).untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage  # which keeps it, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, kind)
    return sum(storage.nbytes() for storage in held.values())


# Kind, attention, dropout, recomputation, precision, degree, sequence parallelism.
_Case = tuple[str, Any, float, Recompute, str, int, bool]
_WAYS = ((1, False), (2, False), (2, True))
_AXES = (KINDS, ("eager", "sdpa"), (0.0, 0.1), get_args(Recompute), ("fp32", "bf16"))
_GRID: list[Any] = [(*case, *way) for case in itertools.product(*_AXES) for way in _WAYS]
_QUICK: list[_Case] = [
    ("gpt2", "eager", 0.1, "none", "fp32", 1, False),
    ("gpt2", "eager", 0.1, "selective", "fp32", 1, False),
    ("gpt2", "eager", 0.0, "full", "fp32", 2, False),
    ("gpt2", "sdpa", 0.0, "none", "fp32", 2, True),
    ("gpt2", "sdpa", 0.1, "full", "bf16", 1, False),
    ("gpt2", "sdpa", 0.1, "selective", "bf16", 2, True),
    ("gpt2-inner", "sdpa", 0.0, "none", "bf16", 2, False),
    ("bert-pre", "sdpa", 0.0, "none", "fp32", 1, False),
    ("bert-pre", "eager", 0.1, "none", "fp32", 2, False),
    ("bert-pre", "sdpa", 0.1, "none", "bf16", 2, True),
    ("bert-post", "eager", 0.1, "selective", "fp32", 2, False),
    ("bert-post", "sdpa", 0.1, "full", "fp32", 2, True),
    ("bert-mlm", "eager", 0.0, "none", "bf16", 2, False),
    ("bert-mlm", "sdpa", 0.0, "selective", "fp32", 1, False),
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in _QUICK else pytest.mark.slow) for case in _GRID]
)
def test_activations(case: _Case, pool: Pool) -> None:
    """Catches a tensor that is forgotten, counted twice, or taken for cut where it is not."""
    kind, attention, dropout, recompute, precision, tp_size, splits = case
    cut: dict[str, Any] = {"tp_size": tp_size, "sequence_parallel": splits}
    run = make_run(
        **cut, attention=attention, precision=PRECISIONS[precision], recompute=recompute, dropout=dropout > 0
    )
    shape = make_shape(kind, dropout=dropout)
    planned = plan_memory(shape, run).activations + sum(kept.bytes for kept in kept_by_loss(shape, run))
    if recompute != "none":  # what is recomputed is there in the backward pass only
        layer, kept = (
            sum(tensor.bytes for tensor in kept_by_layer(shape, r)) for r in (replace(run, recompute="none"), run)
        )
        planned -= layer if recompute == "full" else layer - kept
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    options = {"attn_implementation": attention, "dtype": dtype, "sequence_parallel": splits}
    measured = run_at(pool, tp_size, _measure_activations, kind, tp_size, dropout, recompute, options)[0]
    assert measured == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_formula_of_the_literature(sequence_parallel: bool) -> None:
    """Catches activations that no longer add up to S B H (10 + 24 / P + 5 heads S / (H P)) bytes per layer, and with
    sequence parallelism to all of that, without its 10, over P.

    These are equations 2 and 4 of Korthikanti et al. 2022, for 16 bits and written-out attention. They leave out the
    norms' statistics, 16 bytes per token.
    """
    shape = make_shape("gpt2")
    options: dict[str, Any] = {"precision": PRECISIONS["master"], "attention": "eager", "device": "cuda", "tp_size": 2}
    run = make_run(**options, sequence_parallel=sequence_parallel)
    tokens, hidden, heads = 3 * 64, 64, 4
    split, others = 24 / 2 + 5 * heads * 64 / (hidden * 2), 10 / 2 if sequence_parallel else 10
    statistics = 16 * tokens / (2 if sequence_parallel else 1)
    assert sum(kept.bytes for kept in kept_by_layer(shape, run)) == tokens * hidden * (split + others) + statistics


def test_peak_is_less_than_the_sum_and_more_than_what_is_always_there() -> None:
    """Catches gradients and activations counted as if all of both were there at once, and micro-batches that are."""
    shape = make_shape("gpt2")
    one, two = (plan_memory(shape, make_run(accumulation=n, attention="eager")) for n in (1, 2))
    assert one.parameters + one.optimizer + one.activations + one.logits_and_loss == one.peak
    assert two.peak == one.peak + one.gradients


def test_chunks_are_those_of_the_loss() -> None:
    """Catches a chunk size that was changed in one of its two places."""
    assert activation_memory.LOGITS_PER_CHUNK == linear_cross_entropy._LOGITS_PER_CHUNK
