"""Defects that a contributor could make, each with the test that has to notice it: `make test-mutants`.

A test says little unless it fails when the code is wrong. So for each defect the repository is copied into a temporary
directory, the defect is planted in the copy, and its test runs there; the working tree stays as it is. A defect that is
not caught means that its test no longer guards what it says. To try some: `make test-mutants MUTANTS="padding -j 2"`.

In the list, planted_defects.txt, a line that begins with

    @  names a file of the source and the file of the tests, for the defects that follow,
    #  names the test, and says what is wrong,
    -  is what to replace, part of a line or several lines; it occurs exactly once in the file,
    +  is what takes its place.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.repository import ROOT, repository_files

_LIST = Path(__file__).with_name("planted_defects.txt").read_text(encoding="utf-8")


@dataclass
class Defect:
    """One defect, and the node id of the test that has to fail with it."""

    title: str
    file: str
    test: str
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def planted(self) -> str:
        """The file's source with the defect in it; ValueError if the text does not occur exactly once."""
        source, text = (ROOT / self.file).read_text(encoding="utf-8"), "\n".join(self.old)
        if (count := source.count(text)) != 1:
            raise ValueError(f"{self.file} has this {count} times, and not once: {text}")
        return source.replace(text, "\n".join(self.new))


def defects() -> list[Defect]:
    """All defects of the list."""
    found: list[Defect] = []
    file = test_file = ""
    for line in _LIST.strip().splitlines():
        kind, text = line[0], line[2:]
        if kind == "@":
            file, _, test_file = text.partition(" -> ")
        elif kind == "#":
            test, _, title = text.partition(": ")
            found.append(Defect(title, file, f"{test_file}::{test}"))
        else:
            (found[-1].old if kind == "-" else found[-1].new).append(text)
    return found


def _run(tests: Sequence[str], defect: Defect | None = None) -> tuple[int, str]:
    """Exit code and output of pytest in a copy of the repository, with a defect if there is one."""
    with tempfile.TemporaryDirectory(prefix="hf-megatron-mutant-") as scratch:
        copy = Path(scratch).resolve()
        for path in repository_files():
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        if defect is not None:
            (copy / defect.file).write_text(defect.planted(), encoding="utf-8")
        # Before the working tree, so that all processes of a test import the copy.
        changes = {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{copy / 'conversion'}"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, *tests], cwd=copy, env=changes, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr


def _is_caught(defect: Defect) -> bool:
    """Whether the test fails with the defect; says so."""
    started = time.monotonic()
    code, output = _run([defect.test], defect)
    verdict = {0: "NOT CAUGHT", 1: "caught"}.get(code, f"{output[-3000:]}\nDID NOT RUN (exit code {code} of pytest)")
    print(f"{verdict}: {defect.title} ({defect.file}, {time.monotonic() - started:.0f} s)", flush=True)
    return code == 1


def main() -> int:
    """Try the chosen defects; the exit code is 1 if one is not caught, and 2 if a test fails without any."""
    parser = argparse.ArgumentParser(description="Plant defects, one at a time, and see that the tests catch them.")
    parser.add_argument("select", nargs="?", default="", help="only defects whose title, file or test contains this")
    parser.add_argument("--list", action="store_true", help="list the defects and run nothing")
    parser.add_argument("-j", type=int, default=1, metavar="N", help="try N at a time")
    options = parser.parse_args()
    chosen = [d for d in defects() if any(options.select in text for text in (d.title, d.file, d.test))]
    for defect in chosen:
        try:
            defect.planted()
        except ValueError as error:
            parser.error(str(error))
        if options.list:
            print(f"{defect.title}\n    {defect.file}\n    {defect.test}")
    if options.list:
        return 0
    code, output = _run(sorted({defect.test for defect in chosen})) if chosen else (5, "")
    if code != 0:
        print(f"{output[-3000:]}\nWithout any defect the tests have to pass, and do not; or none was chosen.")
        return 2
    with ThreadPoolExecutor(options.j) as executor:
        caught = list(executor.map(_is_caught, chosen))
    print(f"{sum(caught)} of {len(caught)} defects were caught.")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main())
