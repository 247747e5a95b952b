"""Questions on a text, in SQuAD's official files (1.1 and 2.0).

Source: Rajpurkar et al. 2016, arXiv:1606.05250; Rajpurkar et al. 2018, arXiv:1806.03822.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

from hf_megatron.errors import DataError


class Answers(TypedDict):
    """The reference answers of one question; both lists are empty if there is none."""

    text: list[str]
    answer_start: list[int]  # in characters of the context


class Question(TypedDict):
    """One question, under the names of the columns that SQuAD has on the Hub."""

    id: str
    title: str  # of the article
    context: str
    question: str
    answers: Answers


def read_squad(file: Path) -> list[Question]:
    """Read an official file, such as ``train-v1.1.json`` or ``dev-v2.0.json``.

    The rows of ``datasets.load_dataset("rajpurkar/squad")`` are of the same form, and can be used in their place.

    Raises:
        DataError: The file is not of SQuAD's format.
    """
    try:
        articles = json.loads(file.read_text(encoding="utf-8"))["data"]
        return [
            Question(
                id=question["id"],
                title=article.get("title", ""),
                context=paragraph["context"],
                question=question["question"],
                answers=Answers(
                    text=[answer["text"] for answer in question["answers"]],
                    answer_start=[answer["answer_start"] for answer in question["answers"]],
                ),
            )
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} is not in SQuAD's format, data > paragraphs > qas > answers ({type(error).__name__}: {error})."
        ) from error
