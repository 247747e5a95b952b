"""Checkpoints that something happened to: found before the first step, by file, and nothing half-written stays."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron.checkpoint.checksums import CHECKSUMS, compute_checksums, damages, read_checksums, write_checksums
from hf_megatron.errors import (
    CheckpointError,
    CheckpointFormatError,
    DestinationError,
    DivergenceError,
    ParallelStateError,
)
from hf_megatron.training.training_state import last_usable_checkpoint
from tests.models.architectures import GPT2
from tests.models.reference import Pool, rank
from tests.training.runs import LAYOUTS, Run, layouts, make_trainer, names_in, on_ranks, train
from tests.training.test_failure import AtStep

LAYOUT_NAMES = layouts("tp2", "tp2 x fsdp2")


# ---------------------------------------------------------------------- what may happen to a file


def _delete(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {"deleted": _delete, "truncated": _truncate, "one bit flipped": _flip}


def _message(trainer: Any, checkpoint: Path) -> str:
    """What a resume says; it is to say it before a step is taken."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except CheckpointError as error:
        return "\n".join([f"{type(error).__name__}: {error}", *error.__notes__])
    return "resumed"


def _each_damage(run: Run, files: list[str], kinds: list[str], *, without_checksums: bool) -> dict[str, str]:
    """By file and damage what is said; the damaged copy is the newest checkpoint of the run."""
    trainer, found = make_trainer(run), {}
    copy = run.output / "checkpoint-6"
    intact = run.output / "intact"
    for name in files:
        for kind in kinds:
            if rank() == 0:
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(intact, copy)
                DAMAGES[kind](copy / name)
                if without_checksums:
                    (copy / CHECKSUMS).unlink(missing_ok=True)
            torch.distributed.barrier()
            found[f"{name}, {kind}"] = _message(trainer, copy)
            torch.distributed.barrier()
    return found


def _prepared(pool: Pool, gpt2: Path, directory: Path, layout: str) -> tuple[Run, list[str]]:
    run = Run(gpt2, directory / "run", layout=LAYOUTS.get(layout, {}))
    on_ranks(pool, train, run)
    checkpoint = run.output / "checkpoint-6"
    files = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    checkpoint.rename(run.output / "intact")
    return run, files


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_every_damage_to_every_file_is_found_before_the_first_step(
    pool: Pool, gpt2: Path, tmp_path: Path, layout: str
) -> None:
    """Catches a flipped bit that is trained on, raw errors without a file, and the damaged checkpoint recommended."""
    run, files = _prepared(pool, gpt2, tmp_path, layout)
    assert len(files) > 8
    files.remove(CHECKSUMS)
    results = pool(run.world_size).run(_each_damage, run, files, list(DAMAGES), without_checksums=False, timeout=240)
    for of_rank, found in enumerate(results):
        for case, message in found.items():
            name = case.split(",")[0]
            assert message.startswith("CheckpointIncompleteError"), case
            assert f"{run.output / 'checkpoint-6'} is damaged: {name} " in message, case
            assert f"On rank {of_rank} of {run.world_size}, in step 1" in message
            assert f"The last complete checkpoint is {run.output / 'checkpoint-3'}" in message
    deleted, *damaged = pool(run.world_size).run(_checksums_damaged, run, timeout=120)[0]
    assert deleted == "resumed"
    assert all(f"CheckpointFormatError: {run.output / 'checkpoint-6' / CHECKSUMS} is damaged" in m for m in damaged)


def _checksums_damaged(run: Run) -> list[str]:
    """What is said where the file of the checksums itself is deleted, truncated, or something else."""
    found = _each_damage(run, [CHECKSUMS], ["deleted", "truncated"], without_checksums=False)
    path = run.output / "checkpoint-6" / CHECKSUMS
    if rank() == 0:
        path.write_text('{"config.json": 3}')
    torch.distributed.barrier()
    return [*found.values(), _message(make_trainer(run), path.parent)]


def test_without_checksums_every_missing_or_truncated_file_is_named(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches errors of torch, json and safetensors that do not say which file they are about."""
    run, files = _prepared(pool, gpt2, tmp_path, "tp2")
    # What resuming does not read, or can do without, with a warning.
    for name in (CHECKSUMS, "training_args.bin", "generation_config.json", "README.md"):
        if name in files:
            files.remove(name)
    longer = replace(run, arguments={"max_steps": 8, "save_strategy": "no"})
    found = on_ranks(pool, _each_damage, longer, files, ["deleted", "truncated"], without_checksums=True)
    for case, message in found.items():
        name, kind = case.split(", ")
        if name.startswith("random_state") and kind == "deleted":
            assert message == "resumed", case
        else:
            assert message.startswith("Checkpoint"), (case, message)
            assert name.split("/")[0] in message or "shards in" in message, (case, message)
            assert f"The last complete checkpoint is {run.output / 'checkpoint-3'}" in message, (case, message)


# ---------------------------------------------------------------------- parts of different checkpoints


def _say(run: Run) -> str:
    assert run.resume is not None
    return _message(make_trainer(run), run.resume)


def _rewrite_checksums(directory: Path) -> None:
    write_checksums(directory, compute_checksums(directory))


def test_parts_of_different_checkpoints_are_refused(gpt2: Path, tmp_path: Path) -> None:
    """Catches a run that takes no step and calls it a success, and a learning rate of another step."""
    run = Run(gpt2, tmp_path / "run")
    train(run)
    three, six = run.output / "checkpoint-3", run.output / "checkpoint-6"
    state = json.loads((six / "trainer_state.json").read_text())
    (six / "trainer_state.json").write_text(json.dumps({**state, "global_step": 900}))
    assert "trainer_state.json has " in _say(replace(run, resume=six))
    _rewrite_checksums(six)
    assert "is of step 900, and the directory's name says 6" in _say(replace(run, resume=six))
    (six / "trainer_state.json").write_text(json.dumps(state))
    shutil.copy(three / "scheduler.pt", six / "scheduler.pt")
    _rewrite_checksums(six)
    message = _say(replace(run, resume=six))
    assert "scheduler.pt is of step 3, and trainer_state.json of step 6" in message
    assert f"The last complete checkpoint is {three}" in message


def test_a_checkpoint_that_is_not_whole_is_not_recommended(tmp_path: Path) -> None:
    """Catches advice to resume from what cannot be resumed from."""
    for step in (3, 6, 9):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (directory / "weights").write_bytes(bytes(100))
        _rewrite_checksums(directory)
    nine = tmp_path / "checkpoint-9"
    assert last_usable_checkpoint(tmp_path) == nine
    assert last_usable_checkpoint(tmp_path, unusable=nine) == tmp_path / "checkpoint-6"
    (tmp_path / "checkpoint-6" / "weights").unlink()
    assert last_usable_checkpoint(tmp_path, unusable=nine) == tmp_path / "checkpoint-3"
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    assert last_usable_checkpoint(tmp_path, unusable=nine) is None
    assert last_usable_checkpoint(tmp_path / "nowhere") is None


def test_checksums_are_of_every_file(tmp_path: Path) -> None:
    """Catches files that no rank looks at, and two ranks' shares that do not make up the whole."""
    (tmp_path / "optimizer").mkdir()
    for number in range(5):
        (tmp_path / "optimizer" / f"{number}").write_bytes(bytes([number]))
    parts = [compute_checksums(tmp_path, part=part, num_parts=3) for part in range(3)]
    assert {name: c for part in parts for name, c in part.items()} == compute_checksums(tmp_path)
    _rewrite_checksums(tmp_path)
    checksums = read_checksums(tmp_path)
    assert checksums is not None
    assert len(checksums) == 5
    assert damages(tmp_path, checksums) == []
    (tmp_path / "optimizer" / "3").write_bytes(b"x")
    found = [damages(tmp_path, checksums, part=part, num_parts=2) for part in range(2)]
    assert found == [[], ["optimizer/3 has other bytes than were written"]]
    assert damages(tmp_path, checksums, sizes_only=True) == []
    assert "cannot be read: File name too long" in damages(tmp_path, {"x" * 999: checksums["optimizer/3"]})[0]


# ---------------------------------------------------------------------- disks that are full, weights that are none


def _limit_files() -> None:
    """From now on no file of this process may grow beyond 4 KB, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def _fill_the_disk(run: Run, full_ranks: tuple[int, ...]) -> str:
    trainer = make_trainer(run)
    if rank() in full_ranks:
        trainer.add_callback(AtStep(5, _limit_files))
    try:
        with pytest.raises(DestinationError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "\n".join([str(caught.value), *caught.value.__notes__])


@pytest.mark.parametrize(
    ("layout", "full_ranks"),
    [
        ("one", (0,)),
        ("tp2", (0, 1)),
        ("tp2", (1,)),
        pytest.param("tp2 x fsdp2", (0, 1, 2, 3), marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_leaves_no_half_checkpoint(
    pool: Pool, gpt2: Path, tmp_path: Path, layout: str, full_ranks: tuple[int, ...]
) -> None:
    """Catches half a checkpoint that keeps the disk full, a nested traceback, and an error that names no file."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(layout, {}))
    message = on_ranks(pool, _fill_the_disk, run, full_ranks)
    assert f"{run.output / 'checkpoint-6'} could not be written, and is not there" in message
    assert "bytes free on its disk: " in message
    assert "File too large" in message or "could not be serialized" in message or "I/O" in message
    assert "in step 7" in message
    assert f"The last complete checkpoint is {run.output / 'checkpoint-3'}" in message
    assert names_in(run.output) == ["checkpoint-3"]


def _spoil(model: Any) -> None:
    with torch.no_grad():
        dict(model.named_parameters())["transformer.h.0.mlp.c_fc.weight"][0, 0] = torch.nan


def test_weights_that_are_nan_are_named(gpt2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a learning rate that is blamed for what was in the checkpoint."""
    run = Run(gpt2, tmp_path / "run")
    trainer = make_trainer(run)
    trainer.train()
    six = run.output / "checkpoint-6"
    _spoil(trainer.model)
    trainer.model.save_pretrained(six)
    (six / CHECKSUMS).unlink()
    name = "transformer.h.0.mlp.c_fc.weight"
    with pytest.raises(CheckpointFormatError, match=f"checkpoint-6 holds weights that are inf or nan: {name}"):
        make_trainer(run).train(resume_from_checkpoint=str(six))
    trainer = make_trainer(replace(run, model=six))
    with pytest.raises(DivergenceError, match=f"These weights are inf or nan, and were before the step: {name}"):
        trainer.train()


def _load_again(directory: Path) -> str:
    model = GPT2.load(directory, 2)
    with pytest.raises((CheckpointFormatError, ParallelStateError)) as caught:
        model.load_weights(directory)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_nan_that_one_rank_holds_is_an_error_on_all(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches a rank that goes on to train, and waits for the one that found nan in its part of a weight."""
    model = GPT2.load(gpt2)
    _spoil(model)
    model.save_pretrained(tmp_path)
    first, second = pool(2).run(_load_again, tmp_path)
    assert first.startswith(f"CheckpointFormatError: {tmp_path} holds weights that are inf or nan: transformer.h.0.mlp")
    assert second.startswith("ParallelStateError: rank 0 failed: CheckpointFormatError")
