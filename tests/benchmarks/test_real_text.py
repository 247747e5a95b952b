"""The benchmarks that train on files of real text, by their command lines, on files made up here."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, GPT2TokenizerFast

from benchmarks import bench_finetune_squad, bench_model_sizes, bench_pretrain_gpt2
from benchmarks.articles import hold_out, read_articles
from benchmarks.records import read


def _write_articles(file: Path, count: int, length: int | None = None) -> Path:
    texts = [topics[name][:length] for name in sorted(topics)[:count]]
    file.write_text("".join(f" = Title {i} = \n \n = = Part = = \n {text}\n" for i, text in enumerate(texts)))
    return file


@pytest.mark.parametrize("script", [bench_finetune_squad, bench_model_sizes, bench_pretrain_gpt2])
def test_without_data_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: ModuleType
) -> None:
    """Catches `make bench` failing where the data is not at hand, or overwriting results."""
    script.main(["--output", str(tmp_path)])
    assert "No data was given" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_articles_are_held_out_whole(tmp_path: Path) -> None:
    """Catches a section taken for an article, one that is learnt and tested on, and a test of one end of the text."""
    articles = read_articles([_write_articles(tmp_path / "text.txt", 20)])
    assert [article.split("\n", 1)[0] for article in articles] == [f" = Title {i} = " for i in range(20)]
    learnt, held_out = hold_out(articles, 0.1)
    assert held_out == [articles[0], articles[10]]
    assert learnt == [article for article in articles if article not in held_out]
    assert [len(part) for part in hold_out(articles, 0.001)] == [19, 1]


def test_model_sizes(tmp_path: Path) -> None:
    """Catches a benchmark that no longer runs, sizes that learn from other batches, and a test on what is learnt."""
    file = _write_articles(tmp_path / "text.txt", 10, 300)
    bench_model_sizes.main([str(file), "--quick", "--workers=1", f"--output={tmp_path}"])
    results = read(tmp_path / "model_sizes.json")
    assert (results["train_articles"], results["test_articles"]) == (8, 2)
    large, small = results["runs"]
    assert large["parameters"] > small["parameters"]
    assert large["batches"] == small["batches"]
    assert large["perplexity"] != small["perplexity"]
    assert all(run["perplexity"][-1] < run["perplexity"][0] for run in (large, small))
    every = large["steps"][0]
    assert large["steps"] == [every, 2 * every, 3 * every]
    assert (tmp_path / "model_sizes.png").read_bytes().startswith(b"\x89PNG")


def test_a_larger_model_overtakes() -> None:
    """Catches sizes that are compared across seeds, and a step at which the perplexity is not yet reached."""
    runs: list[dict[str, Any]] = [
        {"seed": seed, "parameters": size, "steps": [10, 20, 30], "perplexity": curve}
        for seed, size, curve in ((1, 9, [8, 5, 4]), (2, 9, [9, 8, 7]), (2, 3, [9, 8, 6]), (1, 3, [9, 7, 5]))
    ]
    assert list(bench_model_sizes.overtaken(runs)) == [(runs[0], runs[3], 20), (runs[1], runs[2], None)]


@pytest.mark.slow
def test_finetune_squad(tmp_path: Path) -> None:
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
    untrained = BertTokenizerFast(model_max_length=128)
    tokenizer = untrained.train_new_from_iterator(topics.values(), 600, show_progress=False)
    tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    arguments = [str(file), f"--model={tmp_path / 'bert'}", f"--output={tmp_path}", "--batch=1", "--epochs=1"]
    bench_finetune_squad.main(arguments)
    results = read(tmp_path / "finetune_squad.json")
    assert (results["train_questions"], results["test_questions"]) == (12, 4)
    one, two = results["runs"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


@pytest.mark.slow
def test_pretrain_gpt2(tmp_path: Path) -> None:
    """Catches a benchmark that no longer runs, or takes a file for one document."""
    file = _write_articles(tmp_path / "text.txt", 12, 200)
    tokenizer = GPT2TokenizerFast().train_new_from_iterator(topics.values(), 400, show_progress=False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = ["--layers=1", "--hidden=16", "--heads=2", "--length=16", "--batch=2", "--steps=20", "--held-out=0.2"]
    bench_pretrain_gpt2.main([str(file), f"--tokenizer={tmp_path / 'tokenizer'}", f"--output={tmp_path}", *sizes])
    results = read(tmp_path / "pretrain_gpt2.json")
    assert (results["train_documents"], results["test_documents"]) == (10, 2)
    one, two = results["runs"]
    assert len(one["perplexity"]) == 10
    assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-3)
