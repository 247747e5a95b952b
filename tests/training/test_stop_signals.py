"""A scheduler's signal: all ranks save and leave together, and the run goes on as if nothing had been."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.models.reference import Pool, assert_all_equal, rank
from tests.training.runs import DROPOUT, LAYOUTS, Run, layouts, make_trainer, names_in, on_ranks, train


class _Signal(TrainerCallback):
    """Sends a signal to its own process before a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step, self.has_ended = number, step, False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.has_ended = True


def _stopped(run: Run, number: int, signalled: int, *, background: bool) -> tuple[int | str | None, int, bool]:
    """The status that a rank exits with, the step, and whether callbacks could close what they had open."""
    trainer = make_trainer(run, background_saving=background)
    callback = _Signal(number, 2)
    callback.number = number if rank() == signalled else 0
    trainer.add_callback(callback)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == handlers
    return caught.value.code, trainer.state.global_step, callback.has_ended


@pytest.mark.parametrize("layout", layouts("tp2", "one", "tp2 x fsdp2"))
@pytest.mark.parametrize(
    ("number", "background"), [(signal.SIGTERM, False), pytest.param(signal.SIGUSR1, True, marks=pytest.mark.slow)]
)
def test_all_ranks_save_and_exit(
    pool: Pool, gpt2: Path, tmp_path: Path, layout: str, number: int, background: bool
) -> None:
    """Catches ranks that wait for one that has left, an exit before all is saved, and steps lost or done twice."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(layout, {}), config=DROPOUT, arguments={"save_steps": 5})
    last = max(run.world_size - 1, 0) if run.layout else 0
    job = (_stopped, run, number, last)
    if run.layout:
        results = pool(run.world_size).run(*job, background=background, timeout=120)
    else:
        torch.set_num_threads(1)
        results = [_stopped(run, number, last, background=background)]
    assert results == [(0, 2, True)] * len(results)
    assert names_in(run.output) == ["checkpoint-2"]
    _, resumed = on_ranks(pool, train, replace(run, resume=run.output / "checkpoint-2"))
    _, expected = on_ranks(pool, train, replace(run, output=tmp_path / "undisturbed"))
    assert_all_equal(resumed, expected)


def _handlers_while_training(run: Run) -> set[Any]:
    found = set()

    class Look(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            found.update({signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)})

    trainer = make_trainer(run)
    trainer.add_callback(Look())
    trainer.train()
    return found


def test_handlers_of_the_users_own_stay(gpt2: Path, tmp_path: Path) -> None:
    """Catches a program's own handling of signals that is lost, and runs without checkpoints that cannot be ended."""
    without_checkpoints = Run(gpt2, tmp_path / "none", arguments={"save_strategy": "no", "max_steps": 1})
    assert _handlers_while_training(without_checkpoints) == {signal.SIG_DFL}
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with_checkpoints = replace(without_checkpoints, output=tmp_path / "some", arguments={"max_steps": 1})
        assert _handlers_while_training(with_checkpoints) == {signal.SIG_IGN}
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
