"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_megatron.errors import DestinationError
from hf_megatron.training.background import Snapshot
from tests.models.reference import Pool, assert_all_equal, rank
from tests.training.runs import DROPOUT, LAYOUTS, Run, layouts, make_trainer, on_ranks, train

# The arguments name their directory, the state has times, and torch pickles its metadata in any order.
_OTHERS = {"training_args.bin", "trainer_state.json", ".metadata", "checksums.json"}


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":  # whose header is in any order
        return {name: tensor.tolist() for name, tensor in load_file(file).items()}
    return None if file.name in _OTHERS else file.read_bytes()


def _files(checkpoint: Path) -> dict[str, Any]:
    return {str(file.relative_to(checkpoint)): _content(file) for file in checkpoint.rglob("*") if file.is_file()}


class _Slow:
    """Lets the thread of a process wait a moment before it writes, so that a few steps are taken meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps_meanwhile = 0
        self.trainer: Any = None
        write = Snapshot.write

        def wait_and_write(snapshot: Snapshot, *arguments: Any) -> None:
            before = self.trainer.state.global_step
            assert threading.current_thread() is not threading.main_thread()
            time.sleep(1.0)
            self.steps_meanwhile += self.trainer.state.global_step - before
            write(snapshot, *arguments)

        monkeypatch.setattr(Snapshot, "write", wait_and_write)


def _train(run: Run) -> int:
    """Train; returns how many steps were taken while checkpoints waited to be written."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        slow = _Slow(monkeypatch)
        slow.trainer = make_trainer(run, background_saving=True)
        slow.trainer.train()
        assert (run.output / "checkpoint-6").is_dir(), "the last checkpoint is not waited for"
        return slow.steps_meanwhile


@pytest.mark.parametrize("layout", layouts("tp2", "one", "tp2 x fsdp2", "tp2 x replicate2"))
def test_the_files_are_those_of_a_blocking_save(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches later weights in an earlier checkpoint, a file that is missing, and training that waits."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(layout, {}), config=DROPOUT, arguments={"save_total_limit": 2})
    assert on_ranks(pool, _train, run) > 0
    blocking = replace(run, output=tmp_path / "blocking")
    steps, weights = on_ranks(pool, train, blocking)
    for name in ("checkpoint-3", "checkpoint-6"):
        files, expected = _files(run.output / name), _files(blocking.output / name)
        assert files.keys() == expected.keys()
        assert [file for file in files if files[file] != expected[file]] == []
    resumed, after = on_ranks(pool, train, replace(run, resume=run.output / "checkpoint-3"))
    assert [step.loss for step in resumed[-3:]] == [step.loss for step in steps[-3:]]
    assert_all_equal(after, weights)


class _Blocked(TrainerCallback):
    """Puts a file where a checkpoint is to go, once training has begun."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if rank() == 0:
            (Path(args.output_dir) / "checkpoint-2").write_text("in the way")


def _fail(run: Run) -> int:
    trainer = make_trainer(run, background_saving=True)
    trainer.add_callback(_Blocked())
    with pytest.raises(DestinationError, match="checkpoint-2 is not a directory"):
        trainer.train()
    return int(trainer.state.global_step)


def test_an_error_of_the_thread_ends_the_run(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches a run that goes on for days while none of its checkpoints is written."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS["tp2"], arguments={"save_steps": 2})
    assert pool(2).run(_fail, run, timeout=120) == [4, 4], "not where the next one begins"
