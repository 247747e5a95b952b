"""A disk that is full when a checkpoint is written: the checkpoints before it stay whole, and the run can go on."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_megatron.errors import DestinationError
from hf_megatron.training.training_state import verify_checkpoint
from tests.distributed import RankFailedError
from tests.models.reference import Pool, assert_all_equal, full_weights, rank
from tests.tiers import cases
from tests.training.runs import LAYOUTS, Run, make_trainer, names_in, on_ranks, train


class _Full(TrainerCallback):
    """Lets no file of one rank's have more bytes than this, from the last step on."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == state.max_steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def _limits_restored() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _train_until_full(run: Run, full_rank: int, num_bytes: int) -> None:
    trainer = make_trainer(run)
    if rank() == full_rank:
        trainer.add_callback(_Full(num_bytes))
    with _limits_restored():
        trainer.train(resume_from_checkpoint=None if run.resume is None else str(run.resume))


def _go_on(run: Run) -> dict[str, torch.Tensor]:
    trainer = make_trainer(run)
    trainer.train(resume_from_checkpoint=True if run.resume is None else str(run.resume))
    return full_weights(trainer.model)


def _content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


_CASES = [
    (layout, full_rank, num_bytes, has_old)
    for layout, num_ranks, sizes in (("one", 1, (100_000, 500_000)), ("tp2", 2, (50_000, 100_000)))
    for full_rank in range(num_ranks)
    for num_bytes in sizes  # too few for the weights, and for the optimizer's state alone
    for has_old in (False, True)
]


@cases(
    "layout, full_rank, num_bytes, has_old",
    _CASES,
    [("one", 0, 500_000, True), ("tp2", 1, 50_000, False), ("tp2", 0, 100_000, True)],
)
def test_a_run_goes_on_when_there_is_space(
    pool: Pool, gpt2: Path, tmp_path: Path, layout: str, full_rank: int, num_bytes: int, has_old: bool
) -> None:
    """Catches half a checkpoint, an old one lost to it, a rank that waits for ever, and what blocks the next run."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(layout, {}))
    undisturbed = replace(run, output=tmp_path / "undisturbed")
    _, expected = on_ranks(pool, train, undisturbed)
    names = ["checkpoint-3"]
    if has_old:
        names.append("checkpoint-6")
        shutil.copytree(undisturbed.output, run.output)
        (run.output / "checkpoint-6/mine").write_text("of the old one")
        run = replace(run, resume=run.output / "checkpoint-3")
    before = _content(run.output)
    state = "stays as it was" if has_old else "is not there"
    error = RankFailedError if run.layout else DestinationError
    with pytest.raises(error, match=f"checkpoint-6 could not be written, and {state}"):
        on_ranks(pool, _train_until_full, run, full_rank, num_bytes)
    assert names_in(run.output) == names
    if has_old:
        assert _content(run.output) == before
    else:
        verify_checkpoint(run.output / "checkpoint-3")
    assert_all_equal(on_ranks(pool, _go_on, run), expected)
    assert names_in(run.output) == ["checkpoint-3", "checkpoint-6"]
    assert not (run.output / "checkpoint-6/mine").exists()
    verify_checkpoint(run.output / "checkpoint-6")
