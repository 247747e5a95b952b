"""Our classes pass every one of transformers' common model tests that the stock classes pass.

The tests come from transformers' source distribution of the installed version, which is downloaded once through pip and
kept in ``.cache``, or in the folder that the environment variable ``HF_MEGATRON_CACHE`` names.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import pytest
from transformers.models.gpt2 import modeling_gpt2

from hf_megatron.partition import GPT2
from tests.repository import ROOT

_HERE = Path(__file__).resolve().parent
_SECONDS = 600  # for each of the two runs, which take half a minute on two cores

# Stock GPT-2 has no plan for tensor parallelism and skips these; ours must not.
_TENSOR_PARALLEL = {
    "test_tp_backward",
    "test_tp_forward_0",
    "test_tp_forward_1",
    "test_tp_generation",
    "test_tp_plan_matches_params",
    "test_tp_plan_shards_input_embeddings",
    "test_tied_head_has_a_tp_plan_entry",
}

_NOT_COMPARED = {
    "GPT2PreTrainedModel": "abstract",
    "GPT2DoubleHeadsModel": "not offered: its multiple-choice head is the only one of its kind among GPT-2 models",
}


def test_every_stock_class_is_compared() -> None:
    """Catches a head that a later transformers adds and that would be left out without anybody deciding so."""
    assert sorted(modeling_gpt2.__all__) == sorted([*(pair.stock for pair in GPT2.classes), *_NOT_COMPARED])


@pytest.mark.slow
@pytest.mark.timeout(2 * _SECONDS)
def test_what_the_stock_classes_pass_ours_pass(tmp_path: Path) -> None:
    """Catches the many ways to be a PreTrainedModel in name only: in saving, tying, resizing, checkpointing, ..."""
    environment = _environment()
    stock_run, our_run = (_start(name, tmp_path, environment) for name in ("StockTest", "MegatronTest"))
    stock, ours = _finish(stock_run), _finish(our_run)

    stock_failures = {name: outcome for name, outcome in stock.items() if outcome not in ("passed", "skipped")}
    assert not stock_failures, _details(stock_failures)  # the tests were asked something wrong about GPT-2
    must_pass = {name for name, outcome in stock.items() if outcome == "passed"} | _TENSOR_PARALLEL
    assert len(must_pass) > 100, sorted(must_pass)
    not_passed = {name: ours.get(name, "not run") for name in must_pass | ours.keys() if ours.get(name) != "passed"}
    lost = {name: outcome for name, outcome in not_passed.items() if name in must_pass or outcome != "skipped"}
    assert not lost, _details(lost)


def _details(outcomes: dict[str, str]) -> str:
    names = sorted(outcomes)
    return "\n\n".join([f"{len(names)} tests: {', '.join(names)}", *(f"{name}: {outcomes[name]}" for name in names)])


def _environment() -> dict[str, str]:
    """Where a test process finds what it imports; ours are named as well, in case they are not installed."""
    roots = (_common_tests(), _HERE / "stand_ins", ROOT, ROOT / "conversion")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots)), "HF_HUB_OFFLINE": "1"}


def _common_tests() -> Path:
    """A folder with the distribution's tests in it, as a package called ``transformers_tests``."""
    version = importlib.metadata.version("transformers")
    cache = Path(os.environ.get("HF_MEGATRON_CACHE", ROOT / ".cache"))
    folder = cache / f"transformers-{version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _download(version, Path(scratch))
            (Path(scratch) / "unpacked").rename(folder)
    return folder


def _download(version: str, scratch: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--no-build-isolation", "--dest", str(scratch)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, f"transformers=={version}"], check=True)
    package = scratch / "unpacked" / "transformers_tests"
    package.mkdir(parents=True)
    with tarfile.open(scratch / f"transformers-{version}.tar.gz") as archive:
        for member in archive:
            if PurePosixPath(member.name).match(f"transformers-{version}/tests/*.py"):
                source = archive.extractfile(member)
                assert source is not None
                (package / PurePosixPath(member.name).name).write_bytes(source.read())


@dataclass(frozen=True)
class _Run:
    process: subprocess.Popen[bytes]
    log: Path
    report: Path


def _start(test_class: str, directory: Path, environment: dict[str, str]) -> _Run:
    log, report = directory / f"{test_class}.log", directory / f"{test_class}.xml"
    # pytest, because the tests are written for it, but without this project's settings.
    command = [sys.executable, "-m", "pytest", f"{_HERE / 'gpt2_common.py'}::{test_class}", "-c", os.devnull]
    command += ["--rootdir", str(ROOT), "--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["--disable-warnings", "--tb=short", f"--junitxml={report}"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=directory, stdout=output, stderr=output)
    return _Run(process, log, report)


def _finish(run: _Run) -> dict[str, str]:
    """By test name: "passed", "skipped", or how it failed."""
    try:
        run.process.wait(_SECONDS)
    finally:
        run.process.kill()
    cases = list(ElementTree.parse(run.report).iter("testcase")) if run.report.is_file() else []
    assert len(cases) > 1, run.log.read_text(errors="replace")  # a single one says why nothing could be run
    outcomes = {}
    for case in cases:
        failures = [part.text or "" for part in case if part.tag in ("failure", "error")]
        is_skipped = case.find("skipped") is not None
        outcomes[case.attrib["name"]] = "\n".join(failures) or ("skipped" if is_skipped else "passed")
    return outcomes
