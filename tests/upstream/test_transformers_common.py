"""Our classes pass every one of transformers' common model tests that the stock classes pass.

The tests come from transformers' source distribution of the installed version, which is downloaded once through pip and
kept in ``.cache``, or in the folder that the environment variable ``HF_MEGATRON_CACHE`` names.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from transformers.models.bert import modeling_bert
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.megatron_bert import modeling_megatron_bert

from hf_megatron.architectures import BERT_POST, BERT_PRE, GPT2, Architecture
from tests.repository import ROOT

_HERE = Path(__file__).resolve().parent
_SECONDS = 900  # for each of the two runs of all tests, which take one to two minutes on an idle core
_ARCHITECTURES = ("GPT2", "BertPre", "BertPost")

# Stock models have no plan for tensor parallelism here and skip these; ours must not.
_TENSOR_PARALLEL = {
    "test_tp_backward",
    "test_tp_forward_0",
    "test_tp_forward_1",
    "test_tp_plan_matches_params",
    "test_tp_plan_shards_input_embeddings",
}

# Abstract, or a part; a head that is not offered; decoders, which are refused.
_NOT_COMPARED = {"PreTrainedModel", "Layer", "DoubleHeadsModel", "ForNextSentencePrediction"}
_NOT_COMPARED |= {"LMHeadModel", "ForCausalLM"}


@pytest.mark.parametrize(
    ("module", "table", "prefix"),
    [
        (modeling_gpt2, GPT2, "GPT2"),
        (modeling_bert, BERT_POST, "Bert"),
        (modeling_megatron_bert, BERT_PRE, "MegatronBert"),
    ],
)
def test_every_stock_class_is_compared(module: ModuleType, table: Architecture, prefix: str) -> None:
    """Catches a class that a later transformers adds and that would be left out without anybody deciding so."""
    offered = {pair.stock for pair in table.classes}
    left_out = {name.removeprefix(prefix) for name in module.__all__ if name not in offered}
    assert left_out <= _NOT_COMPARED


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """How each of transformers' tests ended, by test class and name: "passed", "skipped", or how it failed."""
    directory = tmp_path_factory.mktemp("common")
    # Where they find what they import; ours are named as well, in case they are not installed.
    roots = (_common_tests(), _HERE / "stand_ins", ROOT, ROOT / "conversion")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots)), "HF_HUB_OFFLINE": "1"}
    runs = [_start(kind, directory, environment) for kind in ("Stock", "Our")]
    try:
        for run in runs:
            run.process.wait(_SECONDS)
    finally:
        for run in runs:
            run.process.kill()
    return _read(runs[0]) | _read(runs[1])


@pytest.mark.slow
@pytest.mark.timeout(2 * _SECONDS)  # the first of these has to wait for all of transformers' tests
@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_what_the_stock_classes_pass_ours_pass(architecture: str, outcomes: dict[str, dict[str, str]]) -> None:
    """Catches the many ways to be a PreTrainedModel in name only: in saving, tying, resizing, checkpointing, ..."""
    stock, ours = outcomes[f"Stock{architecture}"], outcomes[f"Our{architecture}"]
    stock_failures = {name: outcome for name, outcome in stock.items() if outcome not in ("passed", "skipped")}
    assert not stock_failures, _details(stock_failures)  # the tests were told something wrong about the model
    must_pass = {name for name, outcome in stock.items() if outcome == "passed"} | _TENSOR_PARALLEL
    must_pass |= {"test_tp_generation"} if architecture == "GPT2" else set()
    not_passed = {name: ours.get(name, "not run") for name in must_pass | ours.keys() if ours.get(name) != "passed"}
    lost = {name: outcome for name, outcome in not_passed.items() if name in must_pass or outcome != "skipped"}
    assert not lost, _details(lost)


def _details(outcomes: dict[str, str]) -> str:
    names = sorted(outcomes)
    return "\n\n".join([f"{len(names)} tests: {', '.join(names)}", *(f"{name}: {outcomes[name]}" for name in names)])


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


class _Run(NamedTuple):
    process: subprocess.Popen[bytes]
    log: Path
    report: Path


def _start(kind: str, directory: Path, environment: dict[str, str]) -> _Run:
    log, report = directory / f"{kind}.log", directory / f"{kind}.xml"
    # pytest, because the tests are written for it, but without this project's settings.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "--noconftest"]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", "--disable-warnings", "--tb=short"]
    command += [f"--junitxml={report}", *(f"{_HERE / 'model_common.py'}::{kind}{name}" for name in _ARCHITECTURES)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=directory, stdout=output, stderr=output)
    return _Run(process, log, report)


def _read(run: _Run) -> dict[str, dict[str, str]]:
    cases = list(ElementTree.parse(run.report).iter("testcase")) if run.report.is_file() else []
    assert len(cases) > 1, run.log.read_text(errors="replace")  # a single one says why nothing could be run
    outcomes: dict[str, dict[str, str]] = {}
    for case in cases:
        failures = [part.text or "" for part in case if part.tag in ("failure", "error")]
        is_skipped = case.find("skipped") is not None
        test_class = case.attrib["classname"].rpartition(".")[2]
        outcome = "\n".join(failures) or ("skipped" if is_skipped else "passed")
        outcomes.setdefault(test_class, {})[case.attrib["name"]] = outcome
    return outcomes
