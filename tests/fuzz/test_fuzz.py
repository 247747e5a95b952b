"""The fuzzer itself, a short run of it, and the cases that it and others have found; ``make fuzz`` runs it longer."""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.checks import FindError, Reader, run
from tests.fuzz.conversions import healthy_conversion
from tests.fuzz.distributed import SEEDS
from tests.fuzz.found import FOUND
from tests.fuzz.guard import CANARY, watched
from tests.fuzz.readers import READERS

# Cases that take a few seconds of CPU time.
_CASES = {"pickle": 200, "torch-file": 120, "safetensors": 200, "training": 20, "adapter": 20, "tokenize": 20}


@pytest.mark.parametrize("name", READERS)
def test_short_run(name: str, tmp_path: Path) -> None:
    """Catches errors that are none of ours, code that runs, hangs and endless memory, whatever is damaged."""
    logging.disable(logging.CRITICAL)  # most cases are warned of
    reader, accepted, saved = READERS[name], [], tmp_path / "case.pickle"
    assert run(reader, reader.healthy(), tmp_path / "case")

    @settings(
        max_examples=_CASES.get(name, 60),
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.cases())
    def check(case: Any) -> None:
        saved.write_bytes(pickle.dumps((name, case)))
        accepted.append(run(reader, case, tmp_path / "case"))

    try:
        check()
    except FindError as error:
        pytest.fail(f"{error}\nrun it again with python -m tests.fuzz --replay {saved}", pytrace=False)
    finally:
        logging.disable(logging.NOTSET)
    assert False in accepted, "what is never refused was not damaged"


@pytest.mark.parametrize("name", SEEDS)
def test_undamaged_distributed_checkpoints(name: str, tmp_path: Path) -> None:
    """Catches checkpoints that are refused before what was changed in them is looked at."""
    assert run(READERS["convert-core"], healthy_conversion(name), tmp_path / "case")


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, tmp_path: Path) -> None:
    """Catches the return of a bug that this very case has shown."""
    reader, make = FOUND[name]
    run(READERS[reader], make(), tmp_path / "case")


def _fails(check: Callable[[], object], tmp_path: Path) -> str:
    def in_watch(case: Any, directory: Path) -> bool:
        with watched(directory):
            check()
        return True

    with pytest.raises(FindError) as caught:
        run(Reader("bad", st.none, in_watch, lambda: None), None, tmp_path / "case")
    return caught.value.kind


def _swallow() -> None:
    with suppress(BaseException):
        os.system("true")


def _wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "case/fifo")
    (tmp_path / "case/fifo").read_bytes()


def _compute() -> None:
    while time.process_time():
        pass


def test_what_a_reader_must_not_do_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a watch that sees nothing."""
    monkeypatch.setattr("tests.fuzz.guard.CPU_SECONDS", 0.3)
    monkeypatch.setattr("tests.fuzz.guard._BLOCKED_SECONDS", 0.5)
    assert "ZeroDivisionError" in _fails(lambda: 1 / 0, tmp_path)
    assert "os.system" in _fails(lambda: os.system("true"), tmp_path)
    assert "os.system" in _fails(_swallow, tmp_path)
    assert "import" in _fails(lambda: __import__(CANARY), tmp_path)
    assert "outside" in _fails(lambda: Path("/dev/shm" if Path("/dev/shm").is_dir() else "/", "x").mkdir(), tmp_path)
    assert "waits for ever" in _fails(lambda: _wait(tmp_path), tmp_path)
    assert "CPU time" in _fails(_compute, tmp_path)
    monkeypatch.setattr("tests.fuzz.guard.CPU_SECONDS", 20)
    if Path("/proc/self/clear_refs").exists():
        assert "MB" in _fails(lambda: bytearray(b"x" * 400 * 10**6) + b"x", tmp_path)
