"""Fuzz the readers of checkpoints, token files and texts: ``python -m tests.fuzz --seconds 60``.

Each reader runs in a process of its own. What is found is saved, with the seed, under ``--finds``; ``--replay`` runs a
saved case again. The exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", HF_HUB_DISABLE_TELEMETRY="1")

import logging

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz import guard
from tests.fuzz.checks import FindError, Reader, run
from tests.fuzz.readers import READERS

_ROUND = 100  # cases of one seed
_MAX_DEATHS = 10
_MEMORY = 3 * 2**30  # address space of a reader's process, beyond that of the process it comes from


class _TimeUp(BaseException):
    pass


class _Session:
    """The cases of one reader, run until its time is up; continued where an earlier process died."""

    def __init__(self, reader: Reader, seed: int, finds: Path, work: Path) -> None:
        self._reader, self._seed, self._finds, self._work = reader, seed, finds, work
        self._result_path = work / "result.json"
        self.result: dict[str, Any] = {"executions": 0, "accepted": 0, "cpu": 0.0, "peak": 0, "finds": {}, "round": 0}

    def save(self, kind: str, details: str, case: Any) -> None:
        """Count a find; keep the smallest case of its kind."""
        found = self.result["finds"].setdefault(kind, {"count": 0, "size": float("inf"), "path": ""})
        found["count"] += 1
        content = pickle.dumps((self._reader.name, case))
        if len(content) >= found["size"]:
            return
        number = list(self.result["finds"]).index(kind)
        path = self._finds / f"{self._reader.name}-{self._seed}-{number}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "case.pickle").write_bytes(content)
        text = f"{kind}\nseed {self._seed}, round {self.result['round']}\n\n{details}\n"
        (path / "report.txt").write_text(text, encoding="utf-8", errors="replace")
        found |= {"size": len(content), "path": str(path)}

    def fuzz(self, seconds: float) -> None:
        """Run rounds until the process has used its time."""
        limit, started = time.process_time() + seconds, time.process_time()
        spent_before = self.result["cpu"]

        def one(case: Any) -> None:
            if time.process_time() > limit:
                raise _TimeUp
            (self._work / "case.pickle").write_bytes(pickle.dumps(case))
            self.result["executions"] += 1
            try:
                self.result["accepted"] += run(self._reader, case, self._work / "case")
            except FindError as error:
                self.save(error.kind, str(error), case)
            self.result["cpu"] = spent_before + time.process_time() - started
            self.result["peak"] = guard.largest_growth
            if self.result["executions"] % 20 == 0:
                self.store()

        try:
            while True:
                self.result["round"] += 1
                self.store()  # so that a round in which the process dies is not run again
                _round(one, self._reader, self._seed * 10**6 + self.result["round"])
        except _TimeUp:
            self.store()

    def store(self) -> None:
        """Leave the result for the process that waits for this one."""
        self._result_path.with_suffix(".new").write_text(json.dumps(self.result))
        self._result_path.with_suffix(".new").rename(self._result_path)

    def fuzz_in_process(self, seconds: float) -> None:
        """The same in a process of its own; one that dies is a find, and another one goes on."""
        left, deaths = seconds, 0
        while left > 0.5 and deaths < _MAX_DEATHS:
            process = os.fork()
            if process == 0:
                self._in_child(left)
            _, status = os.waitpid(process, 0)
            if self._result_path.exists():
                self.result = json.loads(self._result_path.read_text())
            if os.waitstatus_to_exitcode(status) == 0:
                return
            deaths += 1
            code = os.waitstatus_to_exitcode(status)
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            case = pickle.loads((self._work / "case.pickle").read_bytes())
            self.save(f"the process died of {name}", (self._work / "trace.txt").read_text(), case)
            left = seconds - self.result["cpu"]

    def _in_child(self, seconds: float) -> None:
        code = 1
        try:
            self._limit_memory()
            self.fuzz(seconds)
            code = 0
        except BaseException:
            (self._work / "trace.txt").write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
        finally:
            os._exit(code)

    def _limit_memory(self) -> None:
        import faulthandler

        faulthandler.enable((self._work / "trace.txt").open("w"))
        size = guard.status("VmSize")
        if size:
            resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))


def _round(one: Any, reader: Reader, seed: int) -> None:
    options = settings(
        max_examples=_ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    hypothesis.seed(seed)(options(given(reader.cases())(one)))()


def _replay(path: Path) -> int:
    name, case = pickle.loads((path / "case.pickle" if path.is_dir() else path).read_bytes())
    with TemporaryDirectory() as work:
        try:
            run(READERS[name], case, Path(work) / "case")
        except FindError as error:
            print(error)
            return 1
    print("nothing is wrong any more")
    return 0


def _print(name: str, result: dict[str, Any]) -> None:
    counts = f"{result['executions']:>8} {result['accepted']:>8} {result['cpu']:>9.1f} {result['peak'] / 1e6:>8.0f}"
    print(f"{name:<17} {counts} {len(result['finds']):>6}", flush=True)
    for kind, found in sorted(result["finds"].items(), key=lambda item: -item[1]["count"]):
        print(f"    {found['count']:>6} x {kind!r:.200}\n             {found['path']}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line; the exit code says whether something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="CPU time, divided among the readers")
    parser.add_argument("--reader", action="append", choices=list(READERS), help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finds", type=Path, default=Path("fuzz-finds"), help="directory for what is found")
    parser.add_argument("--replay", type=Path, help="run a saved case again")
    given_options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    if given_options.replay is not None:
        return _replay(given_options.replay)
    readers = given_options.reader or list(READERS)
    shared = Path("/dev/shm")
    work = Path(mkdtemp(dir=shared if shared.is_dir() else None))
    print(f"{'reader':<17} {'cases':>8} {'accepted':>8} {'CPU s':>9} {'peak MB':>8} {'finds':>6}", flush=True)
    count = 0
    try:
        for name in readers:
            place = work / name
            place.mkdir()
            (place / "trace.txt").touch()
            # Everything is imported, and the undamaged files are made, before the fork.
            READERS[name].cases()
            assert run(READERS[name], READERS[name].healthy(), place / "case"), f"{name} refuses an undamaged case"
            session = _Session(READERS[name], given_options.seed, given_options.finds, place)
            session.fuzz_in_process(given_options.seconds / len(readers))
            _print(name, session.result)
            count += len(session.result["finds"])
    finally:
        import shutil

        shutil.rmtree(work, ignore_errors=True)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
