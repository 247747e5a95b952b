"""Texts that are more than a run could hold are refused before they are read."""

import json
from pathlib import Path

import datasets
import pytest

from hf_megatron.checkpoint import budgets
from hf_megatron.errors import DataError
from hf_megatron.paper.data.text_sources import open_sources
from tests.fuzz.guard import watched


def _texts(path: Path) -> list[str]:
    return [text for text, _ in open_sources([str(path)])[0].texts(0)]


@pytest.mark.parametrize("kind", ["file.txt", "lines.jsonl", "rows"])
def test_a_document_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Catches a text at the limit that is refused, and one beyond it that is read or not named."""
    text, path = "\u00e9" * 20, tmp_path / kind
    content = json.dumps({"text": text}).encode() + b"\n"
    if kind == "rows":
        datasets.Dataset.from_dict({"text": ["a", text]}).save_to_disk(path)
    else:
        path.write_bytes(text.encode() if kind == "file.txt" else content)
    limit = len(content) if kind == "lines.jsonl" else 40
    monkeypatch.setattr(budgets, "MAX_DOCUMENT_BYTES", limit)
    assert _texts(path)[-1] == text
    monkeypatch.setattr(budgets, "MAX_DOCUMENT_BYTES", limit - 1)
    with pytest.raises(DataError, match=f"the limit for a text is {limit - 1}. Cut it into several") as raised:
        _texts(path)
    place = {"file.txt": "", "lines.jsonl": ", in the line at byte 0", "rows": ", in row 1"}[kind]
    assert str(raised.value).startswith(f"{path}{place}, has at least {limit} bytes")


def test_a_line_of_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a line that becomes gigabytes of objects, and a text whose commas or brackets count as values."""
    monkeypatch.setattr(budgets, "MAX_DOCUMENT_VALUES", 20)
    path = tmp_path / "lines.jsonl"
    text = '[{,"\\' * 30
    path.write_text(json.dumps({"text": text, "n": [1] * 10}))
    assert _texts(path) == [text]
    path.write_text(json.dumps({"text": text, "n": [1] * 20}))
    with pytest.raises(DataError, match="in the line at byte 0, has more than 20 values beside its text"):
        _texts(path)


@pytest.mark.parametrize("name", ["file.txt", "lines.jsonl"])
def test_a_line_beyond_the_limit_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a text that takes its memory before it is refused."""
    monkeypatch.setattr("tests.fuzz.guard.MAX_BYTES", 300 * 10**6)
    with (tmp_path / name).open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(2**40 if name == "file.txt" else 900 * 10**6)
    with watched(tmp_path), pytest.raises(DataError, match="the limit for a text is 134,217,728"):
        _texts(tmp_path / name)
