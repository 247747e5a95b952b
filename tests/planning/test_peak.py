"""The planned peak is what the allocator saw: within 10%, on a CPU even without the weights that are always there."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_megatron import MegatronBertConfig, MegatronBertForMaskedLM, MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.planning import PRECISIONS, ModelShape, Run, plan_memory
from hf_megatron.planning.run import Recompute
from tests.models.reference import Pool, layout, run_at
from tests.planning.models import num_bytes
from tests.tiers import quick

# Large enough that what a layer keeps for a moment does not count for more than in a real model. A GPU's allocator has
# the workspaces of its libraries too, tens of megabytes.
_SIZES = {
    "cpu": {"hidden": 192, "layers": 6, "heads": 4, "vocab": 4001, "length": 192, "batch": 4},
    "cuda": {"hidden": 1024, "layers": 12, "heads": 16, "vocab": 50257, "length": 1024, "batch": 4},
}
_Case = tuple[str, str, Recompute, str, int]


def _config(kind: str, size: dict[str, int]) -> Any:
    if kind == "gpt2":
        return MegatronGPT2Config(
            vocab_size=size["vocab"],
            n_positions=size["length"],
            n_embd=size["hidden"],
            n_layer=size["layers"],
            n_head=size["heads"],
            bos_token_id=0,
            eos_token_id=0,
        )
    return MegatronBertConfig(
        vocab_size=size["vocab"],
        max_position_embeddings=size["length"],
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        intermediate_size=4 * size["hidden"],
    )


def _labels(kind: str, ids: torch.Tensor) -> torch.Tensor:
    """All positions for GPT-2, 15% of them for BERT."""
    if kind == "gpt2":
        return ids
    chosen = torch.randperm(ids.numel(), device=ids.device)[: round(0.15 * ids.numel())]
    labels = torch.full_like(ids, -100)
    labels.view(-1)[chosen] = ids.view(-1)[chosen]
    return labels


def _model_class(kind: str) -> Any:
    return MegatronGPT2LMHeadModel if kind == "gpt2" else MegatronBertForMaskedLM


def _measure(case: _Case, device: str, directory: Path) -> int:
    """The most bytes at any moment of a training step, with the weights and without an optimizer."""
    kind, precision, recompute, attention, tp_size = case
    size = _SIZES[device]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = _model_class(kind).from_config(
        _config(kind, size), distributed_config=layout(tp_size), dtype=dtype, attn_implementation=attention
    )
    if device == "cuda":
        model = model.to(device)
    if recompute != "none":
        model.activation_checkpointing_enable({"recompute": recompute})
    ids = torch.randint(size["vocab"], (size["batch"], size["length"]), device=device)
    labels, options = _labels(kind, ids), {"use_cache": False} if kind == "gpt2" else {}

    def step() -> None:
        model.train()(input_ids=ids, labels=labels, **options).loss.backward()
        model.zero_grad(set_to_none=True)

    if device == "cuda":
        step()  # libraries allocate their workspaces
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    path = directory / f"{os.getpid()}.json"  # of this rank
    seen.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes: list[int] = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return sum(map(num_bytes, model.parameters())) + max(itertools.accumulate(changes))


def _planned(case: _Case, device: str) -> tuple[int, int]:
    """The peak without an optimizer, and the weights."""
    kind, precision, recompute, attention, tp_size = case
    size = _SIZES[device]
    config = {**_config(kind, size).to_dict(), "architectures": [_model_class(kind).__name__]}
    run = Run(
        micro_batch=size["batch"],
        sequence_length=size["length"],
        tp_size=tp_size,
        recompute=recompute,
        attention=attention,  # type: ignore[arg-type]
        precision=PRECISIONS[precision],
        device=device,  # type: ignore[arg-type]
    )
    plan = plan_memory(ModelShape.from_config(config), run)
    return plan.peak - plan.optimizer, plan.parameters


_WAYS = (("sdpa", 1), ("eager", 1), ("sdpa", 2))
_GRID = [
    (*case, *way)
    for case in itertools.product(("gpt2", "bert"), ("fp32", "bf16"), get_args(Recompute))
    for way in _WAYS
]
_QUICK: list[_Case] = [
    ("gpt2", "fp32", "none", "sdpa", 1),
    ("gpt2", "bf16", "selective", "sdpa", 2),
    ("bert", "fp32", "full", "sdpa", 2),
]


@pytest.mark.parametrize(("kind", "precision", "recompute", "attention", "tp_size"), quick(_GRID, _QUICK))
def test_a_cpu(
    kind: str, precision: str, recompute: Recompute, attention: str, tp_size: int, pool: Pool, tmp_path: Path
) -> None:
    """Catches a moment of a step that the plan does not know of, and buffers that live longer than they have to."""
    case = (kind, precision, recompute, attention, tp_size)
    measured = run_at(pool, tp_size, _measure, case, "cpu", tmp_path)[0]
    planned, weights = _planned(case, "cpu")
    assert planned - weights == pytest.approx(measured - weights, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in _GRID if case[-1] == 1], ids=lambda case: "-".join(map(str, case)))
def test_a_gpu(case: _Case, tmp_path: Path) -> None:
    """Catches the same in CUDA's kernels, of which some have a workspace."""
    assert _planned(case, "cuda")[0] == pytest.approx(_measure(case, "cuda", tmp_path), rel=0.1)
