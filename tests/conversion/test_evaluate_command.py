"""``hf-megatron evaluate`` as a user or a script meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM, T5Config

from hf_megatron.paper.evaluation import evaluate_lambada, evaluate_wikitext103
from hf_megatron_conversion import convert
from tests.conversion.commands import Commands
from tests.evaluation.models import PASSAGES, TEXT, load, save_model

_KEYS = {"task", "model", "tp_size", "perplexity", "accuracy", "tokens", "original_tokens", "examples", "seconds"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    files = {"wikitext103": tmp_path / "wiki.test.tokens", "lambada": tmp_path / "lambada_test.jsonl"}
    files["wikitext103"].write_text(TEXT)
    files["lambada"].write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    return files


@pytest.mark.parametrize("tp_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_wikitext103(tp_size: int, model_dir: Path, data: dict[str, Path], command: Commands) -> None:
    """Catches keys that scripts rely on gone missing, options that do not arrive, ranks that disagree or print."""
    options = ["--data", data["wikitext103"], "--stride", "16", "--tp", tp_size]
    code, result, err = command.run("evaluate", "wikitext103", model_dir, *options)
    assert (code, set(result) >= _KEYS) == (0, True), err
    numbers = {name for name, value in result.items() if isinstance(value, (int, float))}
    assert numbers - set(result["units"]) == {"tp_size", "seconds"}
    expected = evaluate_wikitext103(*load(model_dir), TEXT, stride=16)
    assert result["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert (result["tokens"], result["original_tokens"]) == (expected.tokens, expected.original_tokens)
    assert (result["stride"], result["tp_size"], result["accuracy"]) == (16, tp_size, None)
    assert "windows" in err  # progress


def test_lambada_of_shards_with_a_tokenizer_of_two_files(
    model_dir: Path, data: dict[str, Path], tmp_path: Path, command: Commands
) -> None:
    """Catches a tp directory that only its own degree can read, and a tokenizer that needs more than its two files."""
    convert(model_dir, tmp_path / "tp", to="tp", tp_size=2)
    options = ["--data", data["lambada"], "--tokenizer", model_dir / "tokenizer"]
    code, result, _ = command.run("evaluate", "lambada", tmp_path / "tp", *options)
    expected = evaluate_lambada(*load(model_dir), PASSAGES)
    assert (code, set(result) >= _KEYS) == (0, True)
    assert (result["accuracy"], result["examples"]) == (expected.accuracy, len(PASSAGES))
    assert (result["original_tokens"], "accuracy" in result["units"]) == (None, True)


@pytest.mark.parametrize(
    ("task", "label"), [("wikitext103", "per word of the original text"), ("lambada", "per last word")]
)
def test_every_number_says_per_what_it_is(
    task: str, label: str, model_dir: Path, data: dict[str, Path], command: Commands
) -> None:
    """Catches a perplexity per word that is taken for one per token, which is smaller by the tokens of a word."""
    code, out, _ = command.show("evaluate", task, model_dir, "--data", data[task])
    assert (code, "None" in out) == (0, False)
    assert label in " ".join(out.replace("\u2502", " ").split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lambada", "{model}", "--data", "{lambada}", "--stride", "3"], "no windows"),
        (["lambada", "{model}", "--data", "absent.jsonl"], "absent.jsonl"),
        (["lambada", "{model}", "--data", "{lambada}", "--tokenizer", "{data}"], "--tokenizer"),
        (["wikitext103", "{model}", "--data", "{wikitext103}", "--stride", "99"], "48 positions"),
        (["wikitext103", "{model}", "--data", "{wikitext103}", "--tp", "5"], "choose 4 or less"),
        (["wikitext103", "{data}", "--data", "{wikitext103}"], "config.json"),
        (["glue", "{model}", "--data", "{wikitext103}"], "glue"),
    ],
)
def test_what_cannot_be_evaluated(
    arguments: list[str], told: str, model_dir: Path, data: dict[str, Path], command: Commands
) -> None:
    """Catches a traceback, and a refusal that comes after minutes of loading or says nothing."""
    places = {"model": model_dir, "data": data["lambada"].parent, **data}
    assert told in command.refusal("evaluate", *(argument.format(**places) for argument in arguments))


def test_models_that_are_no_causal_language_models(
    data: dict[str, Path], model_dir: Path, tmp_path: Path, command: Commands
) -> None:
    """Catches a BERT that is run as if it predicted the next word, and Megatron-LM's files that end in a traceback."""
    sizes = {"vocab_size": 503, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=64)).save_pretrained(tmp_path / "bert")
    T5Config().save_pretrained(tmp_path / "t5")
    convert(model_dir, tmp_path / "megatron-lm", to="megatron-lm", tp_size=1)
    options = ["--data", data["lambada"], "--tokenizer", model_dir]
    told = {"bert": "sees the words", "t5": "no causal language model", "megatron-lm": "hf-megatron convert"}
    for kind, message in told.items():
        assert message in command.refusal("evaluate", "lambada", tmp_path / kind, *options)
