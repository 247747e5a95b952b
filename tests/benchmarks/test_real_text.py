"""The benchmarks that train on files of real text, by their command lines, on files made up here."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, GPT2TokenizerFast

from tests.repository import ROOT

_NAMES = ("finetune_squad", "pretrain_gpt2")


def _run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    script = ROOT / "benchmarks" / f"bench_{name}.py"
    monkeypatch.setattr("sys.argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")


def _results(directory: Path, name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
    image = (directory / f"{name}.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    return results


@pytest.mark.parametrize("name", [name for name in _NAMES if (ROOT / f"benchmarks/results/{name}.json").exists()])
def test_the_committed_results_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches results and a script that have drifted apart, and two degrees that were not the same."""
    shutil.copy(ROOT / "benchmarks/results" / f"{name}.json", tmp_path)
    _run(monkeypatch, name, "--redraw", "--output", str(tmp_path))
    one, two = _results(tmp_path, name)["runs"]
    assert (one.pop("tp_size"), two.pop("tp_size")) == (1, 2)
    assert one["loss"] == pytest.approx(two["loss"], rel=0.02)


@pytest.mark.parametrize("name", _NAMES)
def test_without_data_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Catches `make bench` failing where the data is not at hand, or overwriting results."""
    _run(monkeypatch, name, "--output", str(tmp_path))
    assert "No data was given" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_finetune_squad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a benchmark that no longer runs, or tests on articles that it has trained on."""
    names = sorted(topics)[:16]
    articles = []
    for name in names:
        text = " ".join(topics[name].split()[:60])
        answers = [{"text": word, "answer_start": text.index(word)} for word in text.split()[5:6]]
        paragraph = {"context": text, "qas": [{"id": name, "question": f"What of {name}?", "answers": answers}]}
        articles.append({"title": name, "paragraphs": [paragraph]})
    file = tmp_path / "questions.json"
    file.write_text(json.dumps({"data": articles}), encoding="utf-8")
    tokenizer = BertTokenizerFast(model_max_length=128).train_new_from_iterator(
        topics.values(), 600, show_progress=False
    )
    tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        )
    ).save_pretrained(tmp_path / "bert")
    arguments = [str(file), f"--model={tmp_path / 'bert'}", f"--output={tmp_path}", "--batch=1", "--epochs=1"]
    _run(monkeypatch, "finetune_squad", *arguments)
    results = _results(tmp_path, "finetune_squad")
    assert (results["train_questions"], results["test_questions"]) == (12, 4)
    one, two = results["runs"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


@pytest.mark.slow
def test_pretrain_gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a benchmark that no longer runs, or takes a file for one document."""
    file = tmp_path / "text.txt"
    names = sorted(topics)[:12]
    file.write_text("".join(f" = {name} = \n \n = = Part = = \n {topics[name]}\n" for name in names), encoding="utf-8")
    tokenizer = GPT2TokenizerFast().train_new_from_iterator(topics.values(), 400, show_progress=False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = ["--layers=1", "--hidden=16", "--heads=2", "--length=16", "--batch=2", "--steps=40", "--held-out=0.2"]
    _run(
        monkeypatch, "pretrain_gpt2", str(file), f"--tokenizer={tmp_path / 'tokenizer'}", f"--output={tmp_path}", *sizes
    )
    results = _results(tmp_path, "pretrain_gpt2")
    assert (results["train_documents"], results["test_documents"]) == (10, 2)
    one, two = results["runs"]
    assert len(one["perplexity"]) == 10
    assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-3)
