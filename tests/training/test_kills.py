"""Ranks are killed at random moments, half of them during a save; each run goes on from what the one before left.

``HF_MEGATRON_KILLS=200`` makes it so many.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_megatron.checkpoint import open_checkpoint
from tests.distributed import RankFailedError
from tests.models.architectures import GPT2
from tests.models.reference import Pool, assert_all_equal, full_weights, rank
from tests.training.runs import DROPOUT, LAYOUTS, Run, make_trainer, names_in

_NUM_KILLS = int(os.environ.get("HF_MEGATRON_KILLS", "3"))
STEPS_PER_LIFE = 8  # at most, on which the next life's count begins


@dataclass(frozen=True)
class Death:
    """Which rank is killed, and when: so many seconds into a step, or into the first save that begins after it.

    Attributes:
        rank: The rank.
        steps: Counted from where the run began.
        is_in_save: Whether to wait for a save.
        delay: Seconds.
    """

    rank: int
    steps: int
    is_in_save: bool
    delay: float


class Killer(TrainerCallback):
    """Kills its own process, from another thread."""

    def __init__(self, death: Death, run_directory: Path) -> None:
        self.death, self.run_directory, self.first_step = death, run_directory, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first_step + self.death.steps:
            threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        while self.death.is_in_save and not any(self.run_directory.glob(".checkpoint-*")):
            time.sleep(0.0005)
        time.sleep(self.death.delay)
        os.kill(os.getpid(), signal.SIGKILL)


class Stopper(TrainerCallback):
    """Ends a run early, with the learning rates that it would have had."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def _live(run: Run, death: Death | None, stop: int, *, background: bool = False) -> dict[str, torch.Tensor]:
    trainer = make_trainer(run, background_saving=background)
    trainer.add_callback(Stopper(stop))
    if death is not None and rank() == death.rank:
        trainer.add_callback(Killer(death, run.output))
    last = get_last_checkpoint(str(run.output)) if run.output.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return full_weights(trainer.model)


def _assert_complete(checkpoint: Path) -> None:
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert open_checkpoint(checkpoint).tensors  # raises if a shard is missing, or cut off
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
    assert torch.load(checkpoint / "scheduler.pt", weights_only=True)["last_epoch"] == step
    assert (checkpoint / "optimizer" / ".metadata").is_file()
    assert (checkpoint / "random_state_0.pt").is_file()


@pytest.mark.parametrize(
    ("num_kills", "background"),
    [
        (_NUM_KILLS, False),
        pytest.param(20, False, marks=pytest.mark.slow),
        pytest.param(20, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(900 + 20 * _NUM_KILLS)
def test_killed_runs_end_and_go_on_to_the_same_weights(
    pool: Pool, tmp_path: Path, num_kills: int, background: bool
) -> None:
    """Catches ranks that wait for a dead one, half a checkpoint taken for a whole one, steps done twice or never."""
    arguments: dict[str, Any] = {
        "max_steps": num_kills * STEPS_PER_LIFE + 4,
        "save_steps": 2,
        "save_total_limit": 2,
        "report_to": [],
    }
    layout = LAYOUTS["tp2"]
    run = Run(
        GPT2.save_stock(tmp_path / "model", num_hidden_layers=1),
        tmp_path / "run",
        layout=layout,
        config=DROPOUT,
        arguments=arguments,
    )
    chance = random.Random(0)
    num_hit_saves = 0
    for number in range(num_kills):
        death = Death(
            rank=chance.randrange(2),
            steps=chance.randint(1, STEPS_PER_LIFE - 3),
            is_in_save=number % 2 == 0,
            delay=chance.uniform(0.0, 0.1),
        )
        with pytest.raises(RankFailedError, match=f"rank {death.rank} failed first") as caught:
            pool(2).run(_live, run, death, arguments["max_steps"], background=background, timeout=120)
        assert "exit code -9" in str(caught.value)
        assert "did not stop within" not in str(caught.value), "the other rank waited"
        is_told = "could not be written, and is not there" in str(caught.value)  # by the other rank, if it has waited
        num_hit_saves += any(run.output.glob(".checkpoint-*")) if background else is_told
        for checkpoint in run.output.glob("checkpoint-*"):
            _assert_complete(checkpoint)
    assert num_hit_saves, "no save was interrupted"
    # Most lives are short, and all the steps that there could have been would take hours.
    stop = 4 + max(int(path.name.removeprefix("checkpoint-")) for path in run.output.glob("checkpoint-*"))
    weights = pool(2).run(_live, run, None, stop, background=background, timeout=240)[0]
    assert [name[:11] for name in names_in(run.output)] == ["checkpoint-"] * 2
    undisturbed = replace(run, output=tmp_path / "undisturbed", arguments={**arguments, "save_strategy": "no"})
    expected = pool(2).run(_live, undisturbed, None, stop, timeout=240 + stop)[0]
    assert_all_equal(weights, expected)
