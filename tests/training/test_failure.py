"""What a run does that cannot go on: ranks that fail or hang, numbers that are none, and what it leaves behind."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_megatron.checkpoint.write_lock import lock_directory
from hf_megatron.errors import DivergenceError
from hf_megatron.training.training_state import remove_old_checkpoints, tidy_checkpoints
from tests.distributed import RankFailedError
from tests.models.reference import Pool, assert_all_equal, full_weights, rank
from tests.training.runs import LAYOUTS, Run, layouts, make_trainer, names_in, on_ranks, spoil_a_gradient, train


class AtStep(TrainerCallback):
    """Does something before a step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.action()


def _fail() -> None:
    raise ValueError("the first cause")


def _train_until(run: Run, action: Callable[[], None]) -> None:
    trainer = make_trainer(run)
    if rank() == 1:
        trainer.add_callback(AtStep(5, action))
    trainer.train()


def test_a_rank_that_raises_ends_the_run_and_is_named(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches ranks that wait for one that is gone, and errors that do not say where to go on from."""
    run = Run(gpt2, tmp_path, layout=LAYOUTS["tp2"])
    with pytest.raises(RankFailedError, match="rank 1 failed first") as caught:
        pool(2).run(_train_until, run, _fail)
    cause, consequence = str(caught.value).split("rank 0: ", 1)
    assert "ValueError: the first cause\nOn rank 1 of 2, in step 5. The last complete checkpoint is" in cause
    assert "checkpoint-3; train(resume_from_checkpoint=True) goes on from it." in cause
    assert "On rank 0 of 2, in step 5. A collective failed, because another rank ended" in consequence


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches collectives that wait for hours, because the argument does not reach them."""
    run = Run(gpt2, tmp_path, layout=LAYOUTS["tp2"], arguments={"ddp_timeout": 3})
    started = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 0 failed first") as caught:
        pool(2).run(_train_until, run, partial(time.sleep, 3600))
    assert time.monotonic() - started < 60
    assert "On rank 0 of 2, in step 5. A collective failed" in str(caught.value)


def _diverge(run: Run) -> tuple[str, dict[str, torch.Tensor]]:
    trainer = make_trainer(run)
    spoil_a_gradient(trainer, list(trainer.model.parameters())[-1], step=5, value=torch.nan)
    with pytest.raises(DivergenceError) as caught:
        trainer.train()
    return f"{caught.value} {caught.value.__notes__}", full_weights(trainer.model)


@pytest.mark.parametrize("layout", layouts("tp2", "one", "tp2 x fsdp2"))
def test_a_step_that_would_spoil_the_weights_is_not_taken(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches weights, and then checkpoints, of nothing but nan, and ranks of which only one notices."""
    arguments = {"lr_scheduler_type": "constant"}
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(layout, {}), arguments=arguments)
    message, weights = on_ranks(pool, _diverge, run)
    assert message.startswith("step 5: the norm of the gradients is nan, the loss ")
    assert "those after step 4" in message
    assert "checkpoint-3; train(resume_from_checkpoint=True)" in message
    stopped = replace(run, output=tmp_path / "stopped", arguments={**arguments, "max_steps": 4})
    _, before = on_ranks(pool, train, stopped)
    assert_all_equal(weights, before)


def test_a_harmless_loss_is_reported_with_its_step(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a nan that Trainer's filter keeps out of the log, so that nobody hears of it."""
    warnings: list[str] = []
    monkeypatch.setattr("hf_megatron.training.trainer.logger.warning", warnings.append)
    trainer = make_trainer(Run(gpt2, tmp_path, arguments={"logging_nan_inf_filter": True, "save_strategy": "no"}))
    stock = trainer.compute_loss

    def infinite(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = stock(*args, **kwargs)
        return loss + torch.inf if trainer.state.global_step + 1 == 2 else loss

    monkeypatch.setattr(trainer, "compute_loss", infinite)
    trainer.train()
    assert len(warnings) == 1
    assert warnings[0].startswith("Step 2: the norm of the gradients is")
    assert "the loss inf on rank 0" in warnings[0]


def _checkpoint(directory: Path, content: str) -> None:
    directory.mkdir(parents=True)
    (directory / "weights").write_text(content)


def _killed(run_directory: Path, step: int, name: str, content: str) -> None:
    """What a process leaves that is killed while it writes or replaces the checkpoint of a step."""
    lock = lock_directory(run_directory / f".checkpoint-{step}.incomplete")
    _checkpoint(lock.directory / name, content)
    lock.release()


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Catches disks that fill up, a checkpoint lost while it was replaced, and one that was about to be deleted."""
    _checkpoint(tmp_path / "checkpoint-3", "three")
    _killed(tmp_path, 6, "checkpoint-6", "half of six")
    _killed(tmp_path, 5, "checkpoint-5.replaced", "five")
    _killed(tmp_path, 3, "checkpoint-3.replaced", "three of an earlier run")
    _checkpoint(tmp_path / ".checkpoint-4.incomplete", "mine")
    _checkpoint(tmp_path / ".checkpoint-3.old", "mine")
    _checkpoint(tmp_path / ".git", "mine")
    _checkpoint(tmp_path / "final", "mine")
    assert Path(str(get_last_checkpoint(str(tmp_path)))).name == "checkpoint-3"
    tidy_checkpoints(tmp_path, is_first=True)
    assert names_in(tmp_path) == [
        ".checkpoint-3.old",
        ".checkpoint-4.incomplete",
        ".git",
        "checkpoint-3",
        "checkpoint-5",
        "final",
    ]
    assert (tmp_path / "checkpoint-3" / "weights").read_text() == "three"
    assert (tmp_path / "checkpoint-5" / "weights").read_text() == "five"


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, "12345"),
        (0, None, "12345"),
        (2, None, "45"),
        (2, 1, "15"),
        (1, 1, "15"),
        (3, 5, "345"),
        (7, None, "12345"),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, limit: int | None, best: int | None, kept: str) -> None:
    """Catches the last or the best checkpoint deleted, and one more or less than asked for."""
    for step in range(1, 6):
        _checkpoint(tmp_path / f"checkpoint-{step}", "")
        os.utime(tmp_path / f"checkpoint-{step}", (step * 10, step * 10))
    remove_old_checkpoints(tmp_path, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert names_in(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_a_checkpoint_being_deleted_has_no_checkpoints_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a directory that looks like a checkpoint and lacks files, when a run is killed while it deletes one."""
    for step in (1, 2):
        _checkpoint(tmp_path / f"checkpoint-{step}", "")
        os.utime(tmp_path / f"checkpoint-{step}", (step * 10, step * 10))
    monkeypatch.setattr("shutil.rmtree", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove_old_checkpoints(tmp_path, 1, None)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


def test_a_run_starts_by_tidying(gpt2: Path, tmp_path: Path) -> None:
    """Catches a resume from an older checkpoint than the last complete one, and litter that stays for good."""
    run = Run(gpt2, tmp_path / "run")
    train(run)
    lock = lock_directory(run.output / ".checkpoint-6.incomplete")
    (run.output / "checkpoint-6").rename(lock.directory / "checkpoint-6.replaced")
    lock.release()
    _killed(run.output, 9, "checkpoint-9", "")
    trainer = make_trainer(replace(run, arguments={"max_steps": 9}))
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry][-3:] == [7, 8, 9]
    assert names_in(run.output) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
