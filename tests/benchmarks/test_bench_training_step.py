"""benchmarks/bench_training_step.py, by its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_decoding, bench_training_step
from benchmarks.peers.agreement import DifferentWorkError


def _run(directory: Path, *arguments: str) -> None:
    bench_training_step.main([*arguments, "--rounds", "2", "--max-foreign-cores", "inf", "--output", str(directory)])


@pytest.mark.slow
def test_it_measures_and_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run that loses earlier results, or is lost itself when one competitor does not run."""
    (tmp_path / "training_step.json").write_text("{}")
    names = ["ours-tp1-1t", "stock-eager-tp1-1t", "stock-eager-tp2-1t"]
    _run(tmp_path, "--workloads", "gpt2-tiny", "--configurations", *names)
    result = json.loads((tmp_path / "training_step.json").read_text())["gpt2-tiny"]
    assert list(result["configurations"]) == names[:2]
    assert all(len(seen["samples"]) == 2 for seen in result["configurations"].values())
    assert result["failed"] == {"stock-eager-tp2-1t": "ValueError: stock transformers computes on 1 rank, not 2"}
    assert "| ours-tp1-1t / stock-eager-tp1-1t |" in (tmp_path / "training_step.md").read_text()
    assert (tmp_path / "training_step.png").read_bytes().startswith(b"\x89PNG")
    assert "round 2: ours-tp1-1t" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_the_run_for_a_card_works_on_a_processor(model: str, tmp_path: Path) -> None:
    """Catches what would only show on a rented GPU: compiled and recomputed competitors, several steps a sample."""
    configurations = bench_training_step.CONFIGURATIONS["cuda", model].split()
    names = [name for name in configurations if "compiled" in name or "recomputed" in name]  # the others run elsewhere
    _run(tmp_path, "--workloads", f"{model}-tiny", "--repetitions", "3", "--batch", "2", "--configurations", *names)
    result = json.loads((tmp_path / "training_step.json").read_text())[f"{model}-tiny"]
    assert result["failed"] == {}
    assert list(result["configurations"]) == names
    assert result["workload"]["batch"] == 2


def test_other_tokens_are_refused() -> None:
    """Catches a fast decoder that decodes something else; models of different kinds are not compared."""
    same = {"gpt2 a": [[[1, 2]], [[1, 2]]], "gpt2 b": [[[1, 2]]], "llama a": [[[3, 4]]]}
    bench_decoding.check_same_tokens(same)
    with pytest.raises(DifferentWorkError, match="gpt2 b and gpt2 a"):
        bench_decoding.check_same_tokens({**same, "gpt2 b": [[[1, 3]]]})
