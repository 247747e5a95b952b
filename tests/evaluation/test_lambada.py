"""LAMBADA accuracy against a loop that is slow and obviously right."""

import json
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron import MegatronGPT2LMHeadModel
from hf_megatron.errors import DataError
from hf_megatron.paper.evaluation import Passage, evaluate_lambada, read_passages
from hf_megatron.paper.evaluation.scoring import encode
from tests.evaluation.models import PASSAGES, load
from tests.live import on_live_ranks
from tests.models.reference import layout

# The last word of the last one has several sub-words.
_PASSAGES = [*PASSAGES, "The keeper climbed the stairs and looked at the lighthousekeeping"]


@torch.no_grad()
def _slow(model: Any, tokenizer: Any, passages: list[str]) -> tuple[list[bool], list[float]]:
    """Whether each last word is right, and its log-probability: one passage at a time."""
    right, logs = [], []
    for text in passages:
        context, word = text.rsplit(" ", 1)
        ids, target = encode(tokenizer, context), encode(tokenizer, " " + word)
        is_right, total = True, 0.0
        for token in target:
            log_probabilities = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            is_right &= int(log_probabilities.argmax()) == token
            total += float(log_probabilities[token])
            ids.append(token)  # teacher forcing: whatever was predicted
        right.append(is_right)
        logs.append(total)
    return right, logs


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@on_live_ranks()
def test_accuracy_is_the_slow_loop_s(tp_size: int, model_dir: Path) -> None:
    """Catches padding that is scored, a word that counts though only its first sub-word is right, and lost examples."""
    model, tokenizer = load(model_dir)
    right, logs = _slow(model, tokenizer, _PASSAGES)
    assert 0 < sum(right) < len(right)  # both outcomes are there to be confused
    ours = MegatronGPT2LMHeadModel.from_pretrained(model_dir, distributed_config=layout(tp_size)).eval()
    result = evaluate_lambada(ours, tokenizer, _PASSAGES, batch_size=4)
    assert result.accuracy == sum(right) / len(right)
    assert result.perplexity == pytest.approx(exp(-sum(logs) / len(logs)), rel=1e-5)
    assert result.tokens > result.examples == len(_PASSAGES)


@pytest.mark.parametrize(
    ("text", "context", "target"),
    [
        ("one two three", "one two", " three"),
        ("said: \n\n yes", "said: \n\n", " yes"),
        ("he said,\nyes.", "he said,", "\nyes."),
        ("raw text , he said `` yes ''\n", "raw text , he said `` yes", " ''\n"),
    ],
)
def test_passages_are_split_at_the_last_word(text: str, context: str, target: str) -> None:
    """Catches a passage that is not the sum of its parts, or a target of two words."""
    assert Passage.split(text) == Passage(context, target)


@pytest.mark.parametrize("text", ["", "word", "  word ", " \n "])
def test_passages_of_one_word_are_refused(text: str) -> None:
    """Catches a word that is predicted from nothing."""
    with pytest.raises(DataError, match="less than two words"):
        Passage.split(text)


def test_files(tmp_path: Path) -> None:
    """Catches blank lines taken for passages, and a line that is none of ours swallowed."""
    plain, lines, wrong = tmp_path / "raw.txt", tmp_path / "test.jsonl", tmp_path / "wrong.jsonl"
    plain.write_text("one two\n\nthree four\n")
    lines.write_text('{"text": "one\\ntwo"}\n{"text": "three four"}\n')
    wrong.write_text('{"text": "one two"}\n{"context": "three"}\n')
    assert read_passages(plain) == ["one two", "three four"]
    assert read_passages(lines) == ["one\ntwo", "three four"]
    with pytest.raises(DataError, match="line 2"):
        read_passages(wrong)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="no passages"):
        read_passages(tmp_path / "empty.txt")


def test_what_cannot_be_evaluated_is_refused(model_dir: Path) -> None:
    """Catches positions the model does not have, and a mean over nothing."""
    model, tokenizer = load(model_dir)
    with pytest.raises(DataError, match="48 positions"):
        evaluate_lambada(model, tokenizer, [json.dumps(PASSAGES) + " end"])
    with pytest.raises(DataError, match="no passages"):
        evaluate_lambada(model, tokenizer, [])
