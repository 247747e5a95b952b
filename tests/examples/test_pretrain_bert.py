"""examples/pretrain_bert.py, by its command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForPreTraining, AutoTokenizer

from hf_megatron import MegatronBertForPreTraining
from tests.repository import ROOT

_TINY = {"layers": 2, "hidden": 32, "heads": 2, "length": 32, "batch": 8, "steps": 30, "warm-up": 5, "vocab-size": 500}
_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def _start(output: Path, *arguments: str, launcher: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(ROOT / "examples/pretrain_bert.py"), "--output", str(output)]
    return subprocess.Popen(
        [*command, *(f"--{name}={value}" for name, value in _TINY.items()), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _losses(process: subprocess.Popen[str]) -> list[float]:
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return [float(loss) for loss in re.findall(r"^step +\d+  loss ([\d.]+)$", stdout, re.MULTILINE)]


@pytest.mark.parametrize("placement", ["post", pytest.param("pre", marks=pytest.mark.slow)])
def test_pretraining_under_python_and_torchrun(tmp_path: Path, placement: str) -> None:
    """Catches an example that no longer runs, does not learn, learns something else on two ranks, or saves no whole
    model with its tokenizer."""
    texts = []
    for name in ("assert", "import"):
        texts.append(tmp_path / f"{name}.txt")
        texts[-1].write_text(topics[name], encoding="utf-8")
    arguments = ["--layernorm-placement", placement, "--text", *map(str, texts)]
    losses = _losses(_start(tmp_path / "one", *arguments, launcher=[]))
    # The trainer of WordPiece tokenizers breaks ties differently in each process, so the second run takes the first's.
    same = ["--tokenizer", str(tmp_path / "one")]
    losses_of_two = _losses(_start(tmp_path / "two", *arguments, *same, launcher=_TORCHRUN))
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.1
    assert losses_of_two == pytest.approx(losses, abs=2e-3)  # rounding, which training amplifies

    assert json.loads((tmp_path / "one/config.json").read_text())["layernorm_placement"] == placement
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "two")
    models = [AutoModelForPreTraining.from_pretrained(tmp_path / name) for name in ("one", "two")]
    assert all(type(model) is MegatronBertForPreTraining for model in models)
    batch = tokenizer("the statement", "is executed", return_tensors="pt")
    with torch.no_grad():
        one_logits, two_logits = (model(**batch).prediction_logits for model in models)
    torch.testing.assert_close(two_logits, one_logits, atol=0.05, rtol=0.0)  # after 30 steps, of logits of about 3
