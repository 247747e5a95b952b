"""RACE: reading it, and the examples made of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from hf_megatron.errors import DataError
from hf_megatron.paper.data import RaceQuestion, RaceQuestions, read_race

_ARTICLE = "The import statement finds a module and binds a name. " * 4
_OPTIONS = ["a module", "a name", "nothing at all", "an exception"]


def _question(question: str = "It binds _ .", answer: str = "B", example_id: str = "high7.txt") -> RaceQuestion:
    return RaceQuestion(example_id=example_id, article=_ARTICLE, question=question, options=_OPTIONS, answer=answer)


def _write(file: Path, name: str, answers: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    questions = [f"Question {i}" for i in range(len(answers))]
    content = {"id": name, "article": _ARTICLE, "questions": questions, "options": [_OPTIONS] * len(answers)}
    content["answers"] = list(answers)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_reading_a_split(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches a level left out, and answers of one question given to another."""
    _write(tmp_path / "dev/middle/1.txt", "middle1.txt", "CA")
    _write(tmp_path / "dev/high/2.txt", "high2.txt", "D")
    questions = read_race(tmp_path / "dev")
    found = [(q["question"], q["answer"]) for q in questions]
    assert found == [("Question 0", "D"), ("Question 0", "C"), ("Question 1", "A")]
    references = [(3, "high"), (2, "middle"), (0, "middle")]
    assert [tuple(r.values()) for r in RaceQuestions(questions, tokenizer).references] == references
    assert len(read_race(tmp_path / "dev/middle")) == 2


def test_other_directories_are_refused(tmp_path: Path) -> None:
    """Catches an empty data set, and a KeyError without the file's name."""
    with pytest.raises(DataError, match=r"holds no \.txt files"):
        read_race(tmp_path)
    (tmp_path / "1.txt").write_text('{"id": "high1.txt"}')
    with pytest.raises(DataError, match=r"1\.txt is not in RACE's format \(KeyError: 'questions'\)"):
        read_race(tmp_path)


@pytest.mark.parametrize(
    ("question", "filled"), [("It binds _ .", "It binds a name ."), ("What does it bind?", "What does it bind? a name")]
)
def test_examples_are_those_of_the_tokenizer(tokenizer: PreTrainedTokenizerBase, question: str, filled: str) -> None:
    """Catches segments the wrong way round, and an option that is not put into the gap."""
    example = RaceQuestions([_question(question)], tokenizer)[0]
    expected = tokenizer(filled, _ARTICLE)
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert len(example[name]) == 4
        assert example[name][1] == expected[name], name
    assert example["label"] == 1


def test_long_texts_are_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches sequences over the limit, and an option cut where the article should be."""
    example = RaceQuestions([_question("What? " * 30)], tokenizer, max_length=40, max_option_length=12)[0]
    for ids, types in zip(example["input_ids"], example["token_type_ids"], strict=True):
        assert len(ids) == len(types) == 40
        assert types.index(1) == 12 + 2
    short = RaceQuestions([_question("What?")], tokenizer, max_length=40, max_option_length=36)[0]
    assert [types.index(1) for types in short["token_type_ids"]] == [
        len(tokenizer(f"What? {option}")["input_ids"]) for option in _OPTIONS
    ]


@pytest.mark.parametrize(
    ("changes", "max_length", "told"),
    [
        *(
            (changes, 512, "a question of RACE has an id that begins with middle or high")
            for changes in ({"answer": "E"}, {"answer": ""}, {"example_id": "college1.txt"})
        ),
        ({}, 131, r"max_length=131 leaves no room for an article .* choose at least 132"),
    ],
)
def test_impossible_questions_are_refused(
    tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any], max_length: int, told: str
) -> None:
    """Catches a label of -1, questions of a level that no score is given for, and examples without an article."""
    with pytest.raises(DataError, match=told):
        RaceQuestions([_question(**changes)], tokenizer, max_length=max_length)
