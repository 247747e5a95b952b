"""RACE: questions on an article with four options each, as examples for ``MegatronBertForMultipleChoice``.

Source: Lai et al. 2017, arXiv:1704.04683; the order of the segments, the option in the place of a gap ``_`` in the
question, and the lengths are those of Megatron-LM's fine-tuning for Shoeybi et al. 2019, arXiv:1909.08053, section 5.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hf_megatron.errors import DataError
from hf_megatron.paper.data.tokens import SegmentPairs, tokenize_distinct

LEVELS = ("middle", "high")


class RaceQuestion(TypedDict):
    """One question, with the column names of RACE on the Hub."""

    example_id: str  # begins with the level
    article: str
    question: str
    options: list[str]
    answer: str  # A to D


def read_race(directory: Path) -> list[RaceQuestion]:
    """Read a split of the official files: every ``.txt`` in the directory and those below it, such as ``RACE/dev``.

    The rows of ``datasets.load_dataset("ehovy/race", "all")`` have the same form. DataError if there are no files, or
    one has another form.
    """
    files = sorted(directory.rglob("*.txt"))
    if not files:
        raise DataError(f"{directory} holds no .txt files; give a split of RACE, such as RACE/dev.")
    questions: list[RaceQuestion] = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            questions += [
                RaceQuestion(example_id=content["id"], article=content["article"], question=q, options=o, answer=a)
                for q, o, a in zip(content["questions"], content["options"], content["answers"], strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file} is not in RACE's format ({type(error).__name__}: {error}).") from error
    return questions


class RaceQuestions(Dataset[dict[str, Any]]):
    """Examples for ``transformers.DataCollatorForMultipleChoice``: the options of a question, and the right one.

    Args:
        questions: Rows as :func:`read_race` gives them, or RACE's rows from the Hub.
        tokenizer: A BERT tokenizer.
        max_length: Longest example, in tokens; the article is cut at its end to fit.
        max_option_length: Longest question with its option, in tokens.

    DataError if a length leaves no room, an answer or a level does not exist, or the tokenizer lacks a token.
    """

    def __init__(
        self,
        questions: Iterable[RaceQuestion],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 512,
        max_option_length: int = 128,
    ) -> None:
        self._pairs, self._room = SegmentPairs(tokenizer), max_length - SegmentPairs.num_special
        if self._room <= max_option_length:
            raise DataError(
                f"max_length={max_length} leaves no room for an article beside options of {max_option_length} tokens; "
                f"choose at least {max_option_length + SegmentPairs.num_special + 1}."
            )
        rows = list(questions)
        self.references = [_reference(row) for row in rows]  # as the metric "race" takes them
        texts = [[_fill_in(row["question"], option) for option in row["options"]] for row in rows]
        options = tokenize_distinct(tokenizer, chain(*texts))
        articles = tokenize_distinct(tokenizer, (row["article"] for row in rows))
        self._rows = [
            (articles[row["article"]].ids, [options[text].ids[:max_option_length] for text in choices])
            for row, choices in zip(rows, texts, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``input_ids``, ``token_type_ids`` and ``attention_mask``, a list for each option, and ``label``."""
        article, options = self._rows[index]
        pairs = [self._pairs.join(option, article[: self._room - len(option)]) for option in options]
        return {
            "input_ids": [pair["input_ids"] for pair in pairs],
            "token_type_ids": [pair["token_type_ids"] for pair in pairs],
            "attention_mask": [[1] * len(pair["input_ids"]) for pair in pairs],
            "label": self.references[index]["option"],
        }


def _reference(row: RaceQuestion) -> dict[str, Any]:
    level = next((level for level in LEVELS if row["example_id"].startswith(level)), None)
    option = "ABCD".find(row["answer"]) if row["answer"] else -1
    if level is None or not 0 <= option < len(row["options"]):
        raise DataError(
            f"a question of RACE has an id that begins with {' or '.join(LEVELS)} and an answer that is the letter of "
            f"an option; {row['example_id']!r} has the answer {row['answer']!r} of {len(row['options'])} options."
        )
    return {"option": option, "level": level}


def _fill_in(question: str, option: str) -> str:
    return question.replace("_", option) if "_" in question else f"{question} {option}"
