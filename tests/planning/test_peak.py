"""The planned peak is what the allocator saw: within 10%, on a CPU even without the weights that are always there."""

import itertools
import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_megatron.planning import PRECISIONS, plan_memory
from hf_megatron.planning.run import Recompute
from tests.models.reference import Pool, run_at
from tests.planning.models import Size, forward, make_model, make_run, make_shape, num_bytes
from tests.tiers import cases

# Large enough that what a layer keeps for a moment does not count for more than in a real model. A GPU's allocator has
# the workspaces of its libraries too, tens of megabytes.
_SIZES = {
    "cpu": Size(batch=4, length=192, vocab=4001, hidden=192, layers=6, heads=4),
    "cuda": Size(batch=4, length=1024, vocab=50257, hidden=1024, layers=12, heads=16),
}
# Kind, precision, recomputation, attention, degree.
_Case = tuple[str, str, Recompute, Any, int]
_AXES = (("gpt2", "bert-mlm"), ("fp32", "bf16"), get_args(Recompute), (("sdpa", 1), ("eager", 1), ("sdpa", 2)))
_GRID = [(*case, *way) for *case, way in itertools.product(*_AXES)]
_QUICK: list[_Case] = [
    ("gpt2", "fp32", "none", "sdpa", 1),
    ("gpt2", "bf16", "selective", "sdpa", 2),
    ("bert-mlm", "fp32", "full", "sdpa", 2),
]


def _measure(case: _Case, device: str, directory: Path) -> int:
    """The most bytes at any moment of a training step, with the weights and without an optimizer."""
    kind, precision, recompute, attention, tp_size = case
    size, dtype = _SIZES[device], torch.bfloat16 if precision == "bf16" else torch.float32
    model: Any = make_model(kind, tp_size, size=size, dtype=dtype, attn_implementation=attention).to(device)
    if recompute != "none":
        model.activation_checkpointing_enable({"recompute": recompute})
    if device == "cuda":
        forward(model, kind, size).loss.backward()  # libraries allocate their workspaces
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        forward(model, kind, size).loss.backward()
        return torch.cuda.max_memory_allocated()
    peaks = []
    for step in range(3):  # the smallest counts: now and then a thread of gloo's holds a buffer a moment longer
        model.zero_grad(set_to_none=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            forward(model, kind, size).loss.backward()
        path = directory / f"{os.getpid()}-{step}.json"  # of this rank
        seen.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
        changes: list[int] = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
        peaks.append(max(itertools.accumulate(changes)))
    return sum(map(num_bytes, model.parameters())) + min(peaks)


def _planned(case: _Case, device: str) -> tuple[int, int]:
    """The peak without an optimizer, and the weights."""
    kind, precision, recompute, attention, tp_size = case
    options = {"tp_size": tp_size, "recompute": recompute, "attention": attention, "device": device}
    run = make_run(size=_SIZES[device], precision=PRECISIONS[precision], **options)
    plan = plan_memory(make_shape(kind, size=_SIZES[device]), run)
    return plan.peak - plan.optimizer, plan.parameters


@cases("kind, precision, recompute, attention, tp_size", _GRID, _QUICK)
def test_a_cpu(
    kind: str, precision: str, recompute: Recompute, attention: str, tp_size: int, pool: Pool, tmp_path: Path
) -> None:
    """Catches a moment of a step that the plan does not know of, buffers that live too long, and a wait that hangs."""
    case = (kind, precision, recompute, attention, tp_size)
    measured = run_at(pool, tp_size, _measure, case, "cpu", tmp_path)[0]
    planned, weights = _planned(case, "cpu")
    assert planned - weights == pytest.approx(measured - weights, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in _GRID if case[-1] == 1], ids=lambda case: "-".join(map(str, case)))
def test_a_gpu(case: _Case, tmp_path: Path) -> None:
    """Catches the same in CUDA's kernels, of which some have a workspace."""
    assert _planned(case, "cuda")[0] == pytest.approx(_measure(case, "cuda", tmp_path), rel=0.1)
