"""The paper's models on a GPU: bytes by kind and at the peak, and collectives, are what the planner says."""

from dataclasses import replace

import pytest

from tests.fake_gpu.runs import Case, difference, plan, trace

pytestmark = pytest.mark.timeout(1200)  # seconds; of 72 layers, on a machine that does other things too

# Degree, precision, recomputation, attention, dropout.
_WAYS = [
    (1, "bf16", "none", "sdpa", 0.1),
    (1, "amp", "none", "sdpa", 0.1),
    (1, "fp32", "none", "sdpa", 0.0),
    (1, "bf16", "full", "sdpa", 0.1),
    (1, "bf16", "none", "eager", 0.1),
    (8, "bf16", "none", "sdpa", 0.1),
    (8, "amp", "none", "sdpa", 0.0),
    (8, "bf16", "selective", "eager", 0.1),
    (8, "amp", "selective", "eager", 0.1),
    (8, "fp32", "full", "eager", 0.0),
]
# As wide as the models are, and not as deep.
_FLAT = [Case(preset, *way, layers=4) for preset in ("gpt2-1.2b", "bert-1.3b") for way in _WAYS]
_SPLIT = [replace(case, sequence_parallel=True) for case in _FLAT if case.tp_size > 1 and case.precision != "fp32"]
_WHOLE = [
    Case("gpt2-1.2b"),
    Case("bert-1.3b"),
    Case("gpt2-1.2b", 8, recompute="full", dropout=0.0, sequence_parallel=True),
    Case("gpt2-8.3b", 8),
    Case("gpt2-8.3b", 8, "amp", "full", sequence_parallel=True),
]


@pytest.mark.parametrize("case", [*_FLAT, *_SPLIT, *_WHOLE], ids=str)
def test_a_step(case: Case) -> None:
    """Catches a wait at full size, a tensor that the plan does not know of or that lives too long, and a collective
    that is not in the plan."""
    assert difference(trace(case)[0], plan(case)) == ""
