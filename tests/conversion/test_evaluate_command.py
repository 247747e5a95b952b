"""``hf-megatron evaluate`` as a user or a script meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_megatron.commands import cli
from hf_megatron.paper.evaluation import evaluate_lambada, evaluate_wikitext103
from hf_megatron_conversion import convert
from tests.evaluation.models import PASSAGES, TEXT, load, save_model

_KEYS = {"task", "model", "tp_size", "perplexity", "accuracy", "tokens", "original_tokens", "examples", "seconds"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("data")
    files = {"wikitext103": directory / "wiki.test.tokens", "lambada": directory / "lambada_test.jsonl"}
    files["wikitext103"].write_text(TEXT)
    files["lambada"].write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    return files


def _run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    code = cli.run(["evaluate", *map(str, arguments), "--json"])
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    return code, json.loads(out), err


def test_wikitext103(model_dir: Path, data: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Catches keys that scripts rely on gone missing, and options that do not arrive."""
    code, result, err = _run(capfd, "wikitext103", model_dir, "--data", data["wikitext103"], "--stride", "16")
    expected = evaluate_wikitext103(*load(model_dir), TEXT, stride=16)
    assert (code, set(result) >= _KEYS) == (0, True)
    assert result["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert (result["tokens"], result["original_tokens"]) == (expected.tokens, expected.original_tokens)
    assert (result["stride"], result["tp_size"], result["accuracy"]) == (16, 1, None)
    assert "windows" in err  # progress


def test_lambada_of_shards_with_a_tokenizer_of_two_files(
    model_dir: Path, data: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a tp directory that only its own degree can read, and a tokenizer that needs more than its two files."""
    convert(model_dir, tmp_path / "tp", to="tp", tp_size=2)
    arguments = ["--data", data["lambada"], "--tokenizer", model_dir / "tokenizer"]
    code, result, _ = _run(capfd, "lambada", tmp_path / "tp", *arguments)
    expected = evaluate_lambada(*load(model_dir), PASSAGES)
    assert (code, set(result) >= _KEYS) == (0, True)
    assert (result["accuracy"], result["examples"]) == (expected.accuracy, len(PASSAGES))
    assert result["original_tokens"] is None


def test_every_number_says_per_what_it_is(
    model_dir: Path, data: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a perplexity per word that is taken for one per token, which is smaller by the tokens of a word."""
    for task, label in (("wikitext103", "per word of the original text"), ("lambada", "per last word")):
        _, result, _ = _run(capfd, task, model_dir, "--data", data[task])
        numbers = {name for name, value in result.items() if isinstance(value, (int, float))}
        assert numbers - set(result["units"]) == {"tp_size", "seconds"}
        assert cli.run(["evaluate", task, str(model_dir), "--data", str(data[task])]) == 0
        shown = " ".join(capfd.readouterr().out.replace("\u2502", " ").split())
        assert label in shown
        assert "None" not in shown


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks(model_dir: Path, data: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Catches ranks that disagree, print in the result's place, or do not come back."""
    arguments = ["--data", data["wikitext103"], "--stride", "16", "--tp", "2"]
    code, result, err = _run(capfd, "wikitext103", model_dir, *arguments)
    assert code == 0, err
    assert result["tp_size"] == 2
    assert result["perplexity"] == pytest.approx(evaluate_wikitext103(*load(model_dir), TEXT, stride=16).perplexity)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lambada", "{model}", "--data", "{lambada}", "--stride", "3"], "no windows"),
        (["lambada", "{model}", "--data", "absent.jsonl"], "absent.jsonl"),
        (["lambada", "{model}", "--data", "{lambada}", "--tokenizer", "{data}"], "--tokenizer"),
        (["wikitext103", "{model}", "--data", "{wikitext103}", "--stride", "99"], "48 positions"),
        (["wikitext103", "{model}", "--data", "{wikitext103}", "--tp", "3"], "choose 1, 2 or 4"),
        (["wikitext103", "{data}", "--data", "{wikitext103}"], "config.json"),
        (["glue", "{model}", "--data", "{wikitext103}"], "glue"),
    ],
)
def test_what_cannot_be_evaluated(
    arguments: list[str], told: str, model_dir: Path, data: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, and a refusal that comes after minutes of loading or says nothing."""
    places = {"model": model_dir, "data": data["lambada"].parent, **data}
    code, result, err = _run(capfd, *(argument.format(**places) for argument in arguments))
    assert code == 2
    assert set(result) == {"error", "error_type"}
    assert told in err
    assert "Traceback" not in err


def test_models_that_are_no_causal_language_models(
    data: dict[str, Path], model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a BERT that is run as if it predicted the next word, and Megatron-LM's files that end in a traceback."""
    from transformers import BertConfig, BertForMaskedLM, T5Config

    sizes = {"vocab_size": 503, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=64)).save_pretrained(tmp_path / "bert")
    T5Config().save_pretrained(tmp_path / "t5")
    arguments = ["--data", data["lambada"], "--tokenizer", model_dir]
    code, _, err = _run(capfd, "lambada", tmp_path / "bert", *arguments)
    assert (code, "sees the words" in err) == (2, True)
    code, _, err = _run(capfd, "lambada", tmp_path / "t5", *arguments)
    assert (code, "no causal language model" in err) == (2, True)
    convert(model_dir, tmp_path / "megatron-lm", to="megatron-lm", tp_size=1)
    code, _, err = _run(capfd, "lambada", tmp_path / "megatron-lm", *arguments)
    assert (code, "hf-megatron convert" in err) == (2, True)
