"""The quickstart, as a user starts it; with fewer steps, which are still enough for the loss to fall clearly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from hf_megatron.commands import cli, quickstart
from hf_megatron.commands.quickstart.train import write
from hf_megatron.errors import HfMegatronError
from tests.models.reference import Pool, rank
from tests.repository import environment

_KEYS = {"tp_size", "steps", "loss_first", "loss_last", "perplexity", "hub_dir", "tp_dir", "max_logit_diff_stock"}


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_megatron", "quickstart", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=290, check=False, env=environment())


# Heads do not divide by 3, and at a degree of one no rank cuts.
@pytest.mark.parametrize("tp_size", [2, *(pytest.param(tp_size, marks=pytest.mark.slow) for tp_size in (1, 3))])
def test_the_whole_journey(tmp_path: Path, tp_size: int) -> None:
    """Catches a stage that broke, output that is not one JSON object, and litter beside the result."""
    output = tmp_path / "out"
    arguments = ["--tp", str(tp_size), "--steps", "28", "--output", str(output)]
    done = _run(*arguments, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert set(result) >= _KEYS
    assert (result["tp_size"], result["problems"]) == (tp_size, [])
    assert result["loss_last"] < 0.9 * result["loss_first"]
    assert result["max_logit_diff_stock"] < 1e-4
    assert result["sample"].startswith("The with statement")
    assert len(result["continuation"]) > len("The with statement")
    assert f"{tp_size} ranks and stock transformers write the same: {result['continuation']!r}" in done.stderr
    assert "This takes about" in done.stderr.splitlines()[0]
    assert len(list((output / "tp").glob("shard-*"))) == tp_size
    files = ["tp/config.json", "tp/tokenizer.json", "hub/tokenizer.json", "hub/README.md"]
    assert [name for name in files if not (output / name).is_file()] == []
    assert json.loads((output / "hub/config.json").read_text())["model_type"] == "gpt2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = _run(*arguments)
    assert (again.returncode, "--overwrite" in again.stderr) == (2, True)


def test_a_broken_cache_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a quickstart that calls it a success when what our models generate is wrong: the logits are right.

    A model that has learned less writes one token for ever, with or without a cache.
    """
    monkeypatch.setattr(quickstart, "_TRAINING", "tests.conversion.quickstart_with_broken_cache")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    assert cli.run(["quickstart", "--tp", "1", "--steps", "100", "--output", str(tmp_path / "out"), "--json"]) == 1
    (problem,) = json.loads(capfd.readouterr().out)["problems"]
    assert "the ranks write" in problem


def _write() -> str:
    model = MagicMock()  # it writes the number of its rank
    model.double.return_value.generate.return_value = torch.tensor([[rank()]])
    with pytest.raises(HfMegatronError) as error:
        write(model, {})
    return str(error.value)


def test_ranks_that_write_different_texts_are_noticed(pool: Pool) -> None:
    """Catches a check of the first rank's text only."""
    assert all("the ranks wrote different continuations" in said for said in pool(2).run(_write))


@pytest.mark.slow
def test_the_default_run_learns(tmp_path: Path) -> None:
    """Catches a model, a text or a number of steps with which the loss falls by less than a third."""
    result = json.loads(_run("--output", str(tmp_path / "out"), "--json").stdout)
    assert result["loss_last"] <= 2 / 3 * result["loss_first"]


def test_nothing_is_left_where_a_stage_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a half-finished directory after an error."""

    def fail(*arguments: object) -> None:
        raise HfMegatronError("training failed")

    monkeypatch.setattr(quickstart, "_train", fail)
    assert cli.run(["quickstart", "--output", str(tmp_path / "out")]) == 2
    assert "training failed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
