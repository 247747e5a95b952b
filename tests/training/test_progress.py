"""What a run says of its speed and memory, and the record that it leaves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron.planning import MACHINES, PRECISIONS, ModelShape, Run
from hf_megatron.planning.planner import model_flops
from hf_megatron.training import progress
from tests.models.reference import Pool
from tests.training.runs import GLOBAL_BATCH, LAYOUTS, LENGTH, make_trainer, on_ranks
from tests.training.runs import Run as Training

KEYS = {"tokens_per_second", "seconds_left", "peak_memory_gb"}


def _history(run: Training) -> tuple[list[dict[str, Any]], float]:
    trainer = make_trainer(run)
    started = time.monotonic()
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], time.monotonic() - started


@pytest.mark.parametrize("name", ["one", "tp2 x replicate2"])
def test_log_entries(pool: Pool, gpt2: Path, tmp_path: Path, name: str) -> None:
    """Catches tokens that count once per rank or once per micro-batch, and time left that does not end."""
    run = Training(gpt2, tmp_path, layout=LAYOUTS.get(name, {}), arguments={"gradient_accumulation_steps": 2})
    entries, seconds = on_ranks(pool, _history, run)
    assert len(entries) == 6
    assert all(entry.keys() >= KEYS for entry in entries)
    assert entries[-1]["seconds_left"] == 0
    record = json.loads((tmp_path / "run.json").read_text())
    tokens = 6 * 2 * GLOBAL_BATCH * LENGTH
    assert tokens / seconds < record["measured"]["tokens_per_second"]
    assert tokens == pytest.approx(
        record["measured"]["tokens_per_second"] * record["measured"]["step_seconds"] * 6, rel=0.01
    )
    layout = {"tp_size": 2, "dp_size": 2} if run.layout else {"tp_size": 1, "dp_size": 1}
    batch = {"micro_batch": GLOBAL_BATCH // layout["dp_size"], "sequence_length": LENGTH, "accumulation": 2}
    assert record["run"] == {**record["run"], **layout, **batch, "precision": "fp32", "device": "cpu", "fsdp": False}
    assert record["device"] == "cpu"


def test_share_of_the_peak(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the peak of another precision, and operations of one rank beside the peak of all."""
    monkeypatch.setattr(progress, "machine_of_device", lambda _: MACHINES["a100-80gb"])
    entries, _ = _history(Training(gpt2, tmp_path, arguments={"max_steps": 2}))
    record = json.loads((tmp_path / "run.json").read_text())
    run = Run(**{**record["run"], "precision": PRECISIONS["fp32"]})
    flops = model_flops(ModelShape.from_config(record["config"]), run)
    expected = flops / record["measured"]["step_seconds"] / MACHINES["a100-80gb"].flops_32bit
    assert record["measured"]["mfu"] == pytest.approx(expected, abs=1e-4)
    assert "mfu" in entries[0]


def test_other_batches_and_models_are_no_error() -> None:
    """Catches a model or a batch without token ids, of which nothing is counted."""
    assert progress._shape_of(torch.nn.Linear(1, 1)) is None
