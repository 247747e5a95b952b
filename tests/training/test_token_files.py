"""Training from token files: the same batches at every layout, and after every resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from hf_megatron.paper.data import open_token_files
from tests.data.indexed import write_pair
from tests.models.reference import Pool
from tests.training.runs import GLOBAL_BATCH, LAYOUTS, LENGTH, Run, layouts, make_trainer

_STEPS, _SAVED = 10, 6
_BATCHES = {"max_steps": _STEPS, "save_steps": _SAVED, "train_sampling_strategy": "sequential"}


def _sequences(data: list[str]) -> Any:
    packing: dict[str, Any] = {"length": LENGTH, "end_of_document": 0, "separate_documents": True, "vocab_size": 131}
    return open_token_files(data, seed=5, multiple_of=GLOBAL_BATCH, **packing)


def _batches(run: Run, data: list[str]) -> list[list[list[int]]]:
    """The token ids that this rank's model saw, by micro-batch."""
    trainer = make_trainer(run, train_dataset=_sequences(data), eval_dataset=None)
    seen: list[list[list[int]]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        assert "position_ids" in kwargs
        seen.append(kwargs["input_ids"].tolist())

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train(resume_from_checkpoint=None if run.resume is None else str(run.resume))
    return seen


def _steps(pool: Pool, run: Run, data: list[str]) -> list[list[list[int]]]:
    """The token ids of each step, of all ranks together."""
    if not run.layout:
        parts = [_batches(run, data)]
    else:
        ranks = pool(run.world_size).run(_batches, run, data, timeout=240)
        tp_size = run.layout["tp_size"]
        assert all(ranks[i] == ranks[i - i % tp_size] for i in range(len(ranks)))
        parts = ranks[::tp_size]
    rows = [row for batches in zip(*parts, strict=True) for batch in batches for row in batch]
    return [rows[i : i + GLOBAL_BATCH] for i in range(0, len(rows), GLOBAL_BATCH)]


@pytest.mark.parametrize("name", layouts("tp2 x fsdp2", "tp2", "tp2 x replicate2"))
def test_every_layout_and_after_resuming(gpt2: Path, pool: Pool, tmp_path: Path, name: str) -> None:
    """Catches other batches at another layout, in a later pass, or after resuming in the middle of one.

    A pass has four steps, and the checkpoint is saved in the second.
    """
    generator = np.random.default_rng(0)
    for i, size in enumerate((150, 400)):
        documents = [[*generator.integers(1, 131, 9).tolist(), 0] for _ in range(size // 10)]
        write_pair(tmp_path / f"data{i}", documents)
    data = ["0.5", str(tmp_path / "data0"), "0.5", str(tmp_path / "data1")]
    loader = DataLoader(_sequences(data), batch_size=GLOBAL_BATCH)
    assert len(loader) == 4
    expected: list[list[list[int]]] = []
    for epoch in (0, 1, 2):
        loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        expected += [batch["input_ids"].tolist() for batch in loader]
    one = Run(gpt2, tmp_path / "one", arguments=_BATCHES)
    ranks = replace(one, output=tmp_path / "ranks", layout=LAYOUTS[name])
    for run in (one, ranks):
        assert _steps(pool, run, data) == expected[:_STEPS]
    # Each goes on with the other's checkpoint, and one process with smaller micro-batches too.
    by_ranks = replace(one, output=tmp_path / "a", resume=ranks.output / f"checkpoint-{_SAVED}")
    smaller = {**_BATCHES, "per_device_train_batch_size": 2, "gradient_accumulation_steps": GLOBAL_BATCH // 2}
    by_one = replace(ranks, output=tmp_path / "b", resume=one.output / f"checkpoint-{_SAVED}")
    for run in (by_ranks, by_one, replace(by_ranks, output=tmp_path / "c", arguments=smaller)):
        assert _steps(pool, run, data) == expected[_SAVED:_STEPS]
