"""How a run begins: anew, from the right checkpoint, or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hf_megatron.errors import CheckpointError, DestinationError, HfMegatronError
from hf_megatron.training.starting import from_first_rank, where_to_start
from tests.live import on_live_ranks
from tests.models.reference import Pool, rank
from tests.training.runs import LAYOUTS, Run, layouts, make_trainer, on_ranks


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """An output directory with a checkpoint."""
    (tmp_path / "run/checkpoint-3").mkdir(parents=True)
    return tmp_path / "run"


def _restart(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))


def test_a_restart_goes_on_and_a_fresh_start_does_not(
    tmp_path: Path, used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an old run that a new one goes on with unasked, and a restart that begins anew."""
    _restart(monkeypatch, 0)
    assert where_to_start(tmp_path / "new") is None
    assert where_to_start(tmp_path / "new", resume=True) == "auto"
    assert where_to_start(used, resume=True) == "auto"
    _restart(monkeypatch, 1)
    assert where_to_start(used) == "auto"
    assert where_to_start(tmp_path / "new") == "auto"


def test_a_refused_start_is_refused_after_its_restart_too(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches torchrun's restart of a refused start that goes on with the old run after all."""
    for count in (0, 1, 2):
        _restart(monkeypatch, count)
        with pytest.raises(DestinationError, match=r"checkpoint-3.*add --resume"):
            where_to_start(used)
    _restart(monkeypatch, 0)
    assert where_to_start(used, resume=True) == "auto"
    _restart(monkeypatch, 1)
    assert where_to_start(used) == "auto", "what was refused once is not what the user has begun since"


@on_live_ranks(2)
def test_one_restarted_agent_counts_for_all(used: Path) -> None:
    """Catches nodes of which some go on and some begin anew: an agent counts the failures of its own ranks only."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _restart(monkeypatch, rank())
        assert where_to_start(used) == "auto"


@on_live_ranks(2)
def test_what_the_first_rank_makes_reaches_all() -> None:
    """Catches nodes that look for rank 0's files on their own disk, and an error of its that the others wait on."""
    assert from_first_rank(lambda: {"made on": rank()}) == {"made on": 0}

    def fail() -> None:
        raise DestinationError("no room")

    with pytest.raises(HfMegatronError, match="no room"):
        from_first_rank(fail)


def _start_message(run: Run) -> str:
    trainer = make_trainer(replace(run, output=run.output / str(rank())))
    with pytest.raises(DestinationError) as caught:
        trainer.train()
    assert trainer.state.global_step == 0
    return str(caught.value)


def test_directories_that_are_not_shared_are_refused(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches hours of training before it shows that no node has a whole checkpoint."""
    messages = pool(2).run(_start_message, Run(gpt2, tmp_path, layout=LAYOUTS["tp2"]), timeout=120)
    assert all(f"ranks 1 do not see what rank 0 writes to {tmp_path}" in message for message in messages)
    assert not list(tmp_path.rglob("*.seen-by-all"))


def _resume(run: Run) -> list[int] | str:
    """The steps that were taken, or the error."""
    trainer = make_trainer(run)
    try:
        trainer.train(resume_from_checkpoint="auto")
    except CheckpointError as error:
        return str(error)
    return [entry["step"] for entry in trainer.state.log_history if "loss" in entry][trainer._initial_global_step :]


@pytest.mark.parametrize("layout", layouts("tp2", "one", "tp2 x fsdp2"))
def test_damaged_checkpoints_are_passed_over(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches a run that cannot go on because its newest checkpoint is damaged, or begins anew because all are."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(layout, {}), arguments={"save_steps": 2})
    assert on_ranks(pool, _resume, run) == [1, 2, 3, 4, 5, 6], "no checkpoint is a fresh start"
    (run.output / "checkpoint-6" / "scheduler.pt").write_bytes(b"")
    longer = replace(run, arguments={"save_steps": 2, "max_steps": 8})
    assert on_ranks(pool, _resume, longer) == [5, 6, 7, 8]
    for checkpoint in run.output.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "epoch": 0}))
    message = on_ranks(pool, _resume, longer)
    assert isinstance(message, str)
    assert f"{run.output / 'checkpoint-8'} is damaged" in message
