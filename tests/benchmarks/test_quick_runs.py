"""The scripts of benchmarks/, each by its command line on something small."""

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, GPT2TokenizerFast

from benchmarks import bench_finetune_squad, bench_model_sizes, bench_pretrain_gpt2, bench_training_step, gpu
from benchmarks.articles import hold_out, read_articles
from benchmarks.command_line import make_parser, parse
from benchmarks.records import RESULTS, read
from tests.tiers import cases


def _trains_each_placement(output: Path) -> bool:
    runs = read(output / "layernorm_placement.json")["runs"]
    expected = [(2, "post"), (2, "pre"), (1, "post"), (1, "pre")]
    assert [(run["panel"]["layers"], run["placement"]) for run in runs] == expected
    return len({tuple(run["masked_lm_loss"]) for run in runs}) == 4


def _is_the_right_way_round(output: Path) -> bool:
    report = read(output / "wikitext103.json")
    seconds = report["seconds_per_window"]
    return bool(report["ratio"] == pytest.approx(seconds["loop"] / seconds["evaluation"], rel=1e-4))


def _converts_to_and_fro(output: Path) -> bool:
    rows = read(output / "conversion.json")["bert-336m"]["directions"]
    assert [(row["from"], row["to"]) for row in rows][:2] == [("hub", "megatron-core"), ("megatron-core", "hub")]
    return all(0 < row["peak_rss_bytes"] < 10**9 and row["cpu_ratio_with_hashlib"] > 0 for row in rows)


# The arguments of a script, and what its results have to be: a function of them, or how often its table has something.
_SCRIPTS: dict[str, tuple[list[str], Callable[[Path], bool] | tuple[str, int]]] = {
    "layernorm_placement": (["--workers", "1"], _trains_each_placement),
    "wikitext103": ([], _is_the_right_way_round),
    "decoding": ([], lambda output: "times the tokens per second" in (output / "decoding.md").read_text()),
    "loading": ([], ("| ours-tp", 5)),
    "shared_heads": ([], ("| seconds of a step |", 1)),
    "recomputation": (["--precisions", "bf16 autocast"], ("\n| bf16 autocast |", 4)),
    "loss_gradient": ([], lambda output: max(r["ratio"] for r in read(output / "loss_gradient.json")["rows"]) < 1.1),
    "conversion": (["--models", "bert-336m", "--repetitions", "1"], _converts_to_and_fro),
    "host_time": ([], ("\n| ours, TP=", 2)),
    "data": ([], lambda output: read(output / "data.json")["times_the_example"] > 0),
    "rank_checks": ([], lambda output: read(output / "rank_checks.json")["seconds"]["exchange"] > 0),
    "background_saving": ([], lambda output: read(output / "background_saving.json")["checkpoint_bytes"] > 0),
}


@cases("name", ((name,) for name in _SCRIPTS), [("layernorm_placement",), ("wikitext103",), ("host_time",)])
def test_it_measures(name: str, tmp_path: Path) -> None:
    """Catches a benchmark that no longer runs, or loses a line of its results."""
    arguments, expected = _SCRIPTS[name]
    import_module(f"benchmarks.bench_{name}").main(["--quick", *arguments, "--output", str(tmp_path)])
    if isinstance(expected, tuple):
        assert (tmp_path / f"{name}.md").read_text().count(expected[0]) == expected[1]
    else:
        assert expected(tmp_path)


def test_a_quick_run_leaves_the_committed_results() -> None:
    """Catches a try-out that replaces the figures of a whole run."""
    parser = make_parser("Measures.", "quick")
    assert parse(parser, [], "name")[1] == RESULTS / "name.json"
    assert parse(parser, ["--quick"], "name")[1].parent != RESULTS


def _compare(directory: Path, *arguments: str) -> None:
    bench_training_step.main([*arguments, "--rounds", "2", "--max-foreign-cores", "inf", "--output", str(directory)])


@pytest.mark.slow
def test_a_comparison_survives_a_competitor_that_fails(tmp_path: Path) -> None:
    """Catches a run that is lost when one competitor does not run."""
    names = ["ours-tp1-1t", "stock-eager-tp1-1t", "stock-eager-tp2-1t"]
    _compare(tmp_path, "--workloads", "gpt2-tiny", "--configurations", *names)
    result = read(tmp_path / "training_step.json")["gpt2-tiny"]
    assert [len(result["configurations"][name]["samples"]) for name in names[:2]] == [2, 2]
    assert result["failed"] == {"stock-eager-tp2-1t": "ValueError: stock transformers computes on 1 rank, not 2"}
    assert "| ours-tp1-1t / stock-eager-tp1-1t |" in (tmp_path / "training_step.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_the_run_for_a_card_works_on_a_processor(model: str, tmp_path: Path) -> None:
    """Catches what would only show on a rented GPU: compiled and recomputed competitors, several steps a sample."""
    configurations = bench_training_step.CONFIGURATIONS["cuda", model].split()
    names = [name for name in configurations if "compiled" in name or "recomputed" in name]  # the others run elsewhere
    _compare(tmp_path, "--workloads", f"{model}-tiny", "--repetitions", "3", "--batch", "2", "--configurations", *names)
    result = read(tmp_path / "training_step.json")[f"{model}-tiny"]
    assert result["failed"] == {}
    assert list(result["configurations"]) == names


@pytest.mark.slow
@pytest.mark.timeout(2400)  # of which it works for three minutes
def test_all_that_a_gpu_shows(tmp_path: Path) -> None:
    """Catches what would only show on a rented GPU: a part of the script that fails, or says nothing."""
    gpu.main(["--device", "cpu", "--quick", "--output", str(tmp_path)])
    results = read(tmp_path / "gpu-cpu.json")
    assert list(results) == ["environment", *gpu.PARTS]
    assert results["tests"]["counts"]["passed"] > 0
    assert all(0 < row["products"] < 1 for row in results["profile"])
    assert all(results[model]["failed"] == {} for model in ("gpt2", "bert", "tensor parallel"))
    assert (tmp_path / "gpu-cpu.md").read_text() == gpu.markdown(results)


def test_a_run_on_a_gpu_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a part that is measured twice, one that is lost when another fails, and a failure that goes unnoticed."""
    measured = []

    def measure(name: str, scale: gpu.Scale) -> dict[str, str]:
        measured.append(name)
        if name == "second" and len(measured) == 2:
            raise RuntimeError("no memory")
        return {"device": scale.device}

    monkeypatch.setattr(gpu, "PARTS", {name: partial(measure, name) for name in ("first", "second", "third")})
    arguments = ["--device", "cpu", "--quick", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="failed: second"):
        gpu.main(arguments)
    gpu.main(arguments)
    gpu.main([*arguments, "--again", "first"])
    assert measured == ["first", "second", "third", "second", "first"]
    assert read(tmp_path / "gpu-cpu.json")["second"] == {"device": "cpu"}


def _write_articles(file: Path, count: int, length: int | None = None) -> Path:
    texts = [topics[name][:length] for name in sorted(topics)[:count]]
    file.write_text("".join(f" = Title {i} = \n \n = = Part = = \n {text}\n" for i, text in enumerate(texts)))
    return file


@pytest.mark.parametrize("script", [bench_finetune_squad, bench_model_sizes, bench_pretrain_gpt2])
def test_without_data_nothing_is_measured(script: ModuleType, tmp_path: Path) -> None:
    """Catches `make bench` failing where the data is not at hand, or overwriting results."""
    script.main(["--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_articles_are_held_out_whole(tmp_path: Path) -> None:
    """Catches a section taken for an article, one that is learnt and tested on, and a test of one end of the text."""
    articles = read_articles([_write_articles(tmp_path / "text.txt", 20)])
    assert [article.split("\n", 1)[0] for article in articles] == [f" = Title {i} = " for i in range(20)]
    learnt, held_out = hold_out(articles, 0.1)
    assert held_out == [articles[0], articles[10]]
    assert learnt == [article for article in articles if article not in held_out]


def test_model_sizes(tmp_path: Path) -> None:
    """Catches a benchmark that no longer runs, and sizes that learn from other batches."""
    file = _write_articles(tmp_path / "text.txt", 10, 300)
    bench_model_sizes.main([str(file), "--quick", "--workers=1", f"--output={tmp_path}"])
    results = read(tmp_path / "model_sizes.json")
    assert (results["train_articles"], results["test_articles"]) == (8, 2)
    large, small = results["runs"]
    assert large["parameters"] > small["parameters"]
    assert large["batches"] == small["batches"]
    assert all(run["perplexity"][-1] < run["perplexity"][0] for run in (large, small))


@pytest.mark.slow
def test_finetune_squad(tmp_path: Path) -> None:
    """Catches a benchmark that no longer runs, or tests on articles that it has trained on."""
    articles = []
    for name in sorted(topics)[:16]:
        text = " ".join(topics[name].split()[:60])
        word = text.split()[5]
        answer = {"text": word, "answer_start": text.index(word)}
        questions = [{"id": name, "question": f"What of {name}?", "answers": [answer]}]
        articles.append({"title": name, "paragraphs": [{"context": text, "qas": questions}]})
    (tmp_path / "questions.json").write_text(json.dumps({"data": articles}), encoding="utf-8")
    untrained = BertTokenizerFast(model_max_length=128)
    tokenizer = untrained.train_new_from_iterator(topics.values(), 600, show_progress=False)
    tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    options = [f"--model={tmp_path / 'bert'}", f"--output={tmp_path}", "--batch=1", "--epochs=1"]
    bench_finetune_squad.main([str(tmp_path / "questions.json"), *options])
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
    assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-3)
