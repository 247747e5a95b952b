"""README's table of speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import profile_training_step, readme_table
from benchmarks.bench_decoding import OURS, PEER
from benchmarks.records import RESULTS, read

_TRAINING = RESULTS / "training_step.json"


def _samples(name: str, *seconds: float) -> list[dict[str, Any]]:
    return [{name: value, "foreign": 0.0, "waited": 0.0} for value in seconds]


def _training() -> dict[str, Any]:
    configurations = {
        "ours-tp2-1t": {"samples": _samples("step", 1.0, 2.0, 3.0)},
        "dtensor-tp2-1t": {"samples": _samples("step", 2.0, 4.0, 6.0)},
    }
    environment = {"processor": "a processor", "cores": 2, "versions": {"torch": "2"}}
    return {"gpt2-fp32": {"configurations": configurations, "max_foreign_cores": 0.1, "environment": environment}}


def test_ratios_stand_in_their_columns() -> None:
    """Catches a ratio the wrong way round, one in another row or column, and a blank that is not left blank."""
    samples = {OURS: _samples("seconds", 3.0), PEER: _samples("seconds", 4.0)}
    text = readme_table.block(_training(), {"bfloat16": {"samples": samples, "max_foreign_cores": 0.1}})
    assert "| the same to DTensor's `parallelize_module`, `loss_parallel` | 0.50 (0.50 to 0.50) |  |\n" in text
    assert "| GPT-2 step in one process, to stock transformers |  |  |\n" in text
    assert "| greedy decoding on two ranks, to a Llama under transformers' TP |  | 0.75 |\n" in text
    assert "\na processor, 2 cores; torch 2.\n" in text


def test_the_documents_have_what_was_measured() -> None:
    """Catches a README or a docs/performance.md with other figures than the committed results."""
    expected = readme_table.block(read(_TRAINING), read(RESULTS / "decoding.json"))
    assert expected in readme_table.README.read_text(encoding="utf-8")
    profile = profile_training_step.markdown(read(RESULTS / "profile.json"))
    assert profile in (readme_table.README.parent / "docs" / "performance.md").read_text(encoding="utf-8")


def test_it_is_put_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a table that replaces more of the README than its own place."""
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- python -m benchmarks.readme_table --write -->\nold\n<!-- end -->\nbelow\n")
    monkeypatch.setattr(readme_table, "README", readme)
    monkeypatch.setattr(readme_table, "read", lambda file: _training() if file == _TRAINING else {})
    readme_table.main(["--write"])
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "old" not in lines
    assert any("DTensor" in line for line in lines)

    readme.write_text("nothing\n")
    with pytest.raises(SystemExit):
        readme_table.main(["--write"])
    assert readme.read_text() == "nothing\n"
