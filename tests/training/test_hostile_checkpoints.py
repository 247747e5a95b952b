"""Training checkpoints made to run code, or to read elsewhere: refused, and nothing of them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron.checkpoint.checksums import CHECKSUMS
from hf_megatron.errors import CheckpointError
from hf_megatron.training.training_state import check_step
from tests.training.runs import Run, make_trainer, train


class _Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self._mark),)


@pytest.fixture(scope="module")
def finished(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a checkpoint that has no checksums, which whoever changes a file could adapt."""
    run = Run(gpt2, tmp_path_factory.mktemp("finished") / "run")
    train(run)
    (run.output / "checkpoint-6" / CHECKSUMS).unlink()
    return run


def _evil_metadata(checkpoint: Path, mark: Path) -> None:
    path = checkpoint / "optimizer" / ".metadata"
    argument = pickle.dumps(str(mark), 0).partition(b"\n")[0] + b"\n"  # without a memo
    # A call whose result is dropped, and then what the file held.
    path.write_bytes(b"cposix\nmkdir\n(" + argument + b"tR0" + path.read_bytes())


def _metadata(checkpoint: Path, change: Callable[[Any, Any], None]) -> None:
    """Change the place of an entry that is no tensor."""
    path = checkpoint / "optimizer" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    (index, place) = next((i, p) for i, p in metadata.storage_data.items() if i.fqn.endswith(".lr"))
    change(place, index)
    path.write_bytes(pickle.dumps(metadata))


def _evil_entry(checkpoint: Path, mark: Path) -> None:
    data = checkpoint / "optimizer" / "__0_0.distcp"
    start = data.stat().st_size
    with data.open("ab") as file:
        torch.save({"lr": _Evil(mark)}, file)

    def change(place: Any, index: Any) -> None:
        place.offset, place.length = start, data.stat().st_size - start

    _metadata(checkpoint, change)


def _elsewhere(checkpoint: Path, mark: Path) -> None:
    _metadata(checkpoint, lambda place, index: setattr(place, "relative_path", "../../other.distcp"))


def _transformed(checkpoint: Path, mark: Path) -> None:
    _metadata(checkpoint, lambda place, index: setattr(place, "transform_descriptors", ["zstd"]))


def _computed(checkpoint: Path, mark: Path) -> None:
    """A place that only a call gives, which cannot be looked into."""
    path = checkpoint / "optimizer" / ".metadata"
    name = b"X\x0b\0\0\0../x.distcp"
    call = b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n(" + name + b"K\0K\1tR0"
    path.write_bytes(call + path.read_bytes())


def _pipe(checkpoint: Path, mark: Path) -> None:
    (checkpoint / "optimizer" / "__0_0.distcp").unlink()
    os.mkfifo(checkpoint / "optimizer" / "__0_0.distcp")


def _saved(name: str) -> Callable[[Path, Path], None]:
    def save(checkpoint: Path, mark: Path) -> None:
        with (checkpoint / name).open("wb") as file:
            torch.save(_Evil(mark), file)

    return save


def _large_metadata(checkpoint: Path, mark: Path) -> None:
    (checkpoint / "optimizer" / ".metadata").write_bytes(b"\x80\x02\x8b\xff\xff\x00\x00" + bytes(0xFFFF) + b".")


def _state(name: str, content: Any) -> Callable[[Path, Path], None]:
    return lambda checkpoint, mark: torch.save(content, checkpoint / name)


def _trainer_state(text: str) -> Callable[[Path, Path], None]:
    def write(checkpoint: Path, mark: Path) -> None:
        (checkpoint / "trainer_state.json").write_text(text)

    return write


_CHANGES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "metadata": (_evil_metadata, r"\.metadata is refused: its pickle asks for '\w+\.mkdir', which could run any code"),
    "entry": (_evil_entry, "optimizer cannot be read: (?s:.*)mkdir"),
    "elsewhere": (_elsewhere, r"places a tensor in '\.\./\.\./other\.distcp'"),
    "transformed": (_transformed, "__0_0.distcp is compressed or otherwise transformed"),
    "computed": (_computed, "places a tensor in None"),
    "pipe": (_pipe, "is neither a file nor a directory"),
    "integer": (_large_metadata, "an integer of 524280 bits"),
    "scheduler": (_saved("scheduler.pt"), "scheduler.pt cannot be read"),
    "nested state": (_trainer_state('{"a":' * 10**5), "trainer_state.json cannot be read"),
    "long integer": (_trainer_state('{"global_step": %s}' % ("9" * 5000)), "trainer_state.json cannot be read"),
    "other step": (_trainer_state('{"global_step": [[[[[[[[6]]]]]]]]}'), "is of step a list"),
    "random state of another shape": (_state("random_state_0.pt", {"python": (1, 2, 3)}), "no state of random streams"),
    "schedule without functions": (_state("scheduler.pt", {"last_epoch": 6}), "holds no state of a LambdaLR: KeyError"),
    "schedule of another shape": (_state("scheduler.pt", [1]), "scheduler.pt holds no state of a schedule"),
    "random state": (_saved("random_state_0.pt"), "random_state_0.pt cannot be read"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("change", "message"), _CHANGES.values(), ids=_CHANGES)
def test_nothing_in_a_checkpoint_runs(
    finished: Run, tmp_path: Path, change: Callable[[Path, Path], None], message: str
) -> None:
    """Catches code that runs, or a file elsewhere that is read, because a run is resumed."""
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(finished.output / "checkpoint-6", checkpoint)
    change(checkpoint, tmp_path / "mark")
    resumed = replace(
        finished, output=tmp_path / "run", resume=checkpoint, arguments={"max_steps": 8, "save_strategy": "no"}
    )
    with pytest.raises(CheckpointError, match=message):
        make_trainer(resumed).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "mark").exists()


def test_what_runs_is_what_was_meant(finished: Run, tmp_path: Path) -> None:
    """Catches the tests above passing because their files would run nothing anyway."""
    for number, change in enumerate((_evil_metadata, _saved("optimizer/.metadata"))):
        shutil.copytree(finished.output / "checkpoint-6", tmp_path / str(number))
        change(tmp_path / str(number), tmp_path / f"mark-{number}")
    pickle.loads((tmp_path / "0" / "optimizer" / ".metadata").read_bytes())
    torch.load(tmp_path / "1" / "optimizer" / ".metadata", weights_only=False)
    assert (tmp_path / "mark-0").exists()
    assert (tmp_path / "mark-1").exists()


def test_numbers_of_large_runs(finished: Run, tmp_path: Path) -> None:
    """Catches a run refused because it took more than 2^64 floating-point operations."""
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(finished.output / "checkpoint-6", checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "total_flos": 10**24}))
    check_step(checkpoint)


def test_training_arguments_are_not_read(finished: Run, tmp_path: Path) -> None:
    """Catches the one file that only unpickling could read, read on resume."""
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(finished.output / "checkpoint-6", checkpoint)
    _saved("training_args.bin")(checkpoint, tmp_path / "mark")
    resumed = replace(
        finished, output=tmp_path / "run", resume=checkpoint, arguments={"max_steps": 7, "save_strategy": "no"}
    )
    make_trainer(resumed).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "mark").exists()
