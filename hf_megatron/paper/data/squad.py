"""SQuAD: questions on a text, as windows for ``MegatronBertForQuestionAnswering``, and answers from its logits.

An example is ``[CLS] question [SEP] text [SEP]``. A text that is too long becomes several windows, each ``doc_stride``
tokens after the one before. A window's labels are the places of the answer's first and last token, or 0 and 0,
``[CLS]``, if the answer is not in it.

Shapes: W windows, S sequence, T tokens of a window's text.

Source: Rajpurkar et al. 2016, arXiv:1606.05250, and 2018, arXiv:1806.03822; windows and scores: Devlin et al. 2018,
arXiv:1810.04805, sections 4.2 and 4.3, and the defaults of its published code.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import exp, inf
from operator import itemgetter
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_megatron.errors import DataError
from hf_megatron.paper.data.tokens import SegmentPairs, tokenize_distinct

logger = logging.get_logger(__name__)

Logits = NDArray[np.floating]


class Answers(TypedDict):
    """The reference answers of one question; both lists are empty if there is none."""

    text: list[str]
    answer_start: list[int]  # in characters of the context


class Question(TypedDict):
    """One question, with the column names of SQuAD on the Hub."""

    id: str
    title: str  # of the article
    context: str
    question: str
    answers: Answers


def read_squad(file: Path) -> list[Question]:
    """Read an official file, such as ``train-v1.1.json`` or ``dev-v2.0.json``.

    The rows of ``datasets.load_dataset("rajpurkar/squad")`` have the same form. DataError if the file has another one.
    """
    try:
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
            for article in json.loads(file.read_text(encoding="utf-8"))["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} is not in SQuAD's format, data > paragraphs > qas > answers ({type(error).__name__}: {error})."
        ) from error


@dataclass(frozen=True)
class Window:
    """A part of a question's text."""

    question: int  # index of the question
    first: int  # index of the window's first token in the text
    size: int  # number of the text's tokens in it
    offset: int  # index of the window's first token in the example, after [CLS] question [SEP]


class QuestionWindows(Dataset[dict[str, torch.Tensor]]):
    """Windows over the texts of questions.

    Args:
        questions: Rows as :func:`read_squad` gives them, or SQuAD's rows from the Hub.
        tokenizer: A fast BERT tokenizer.
        max_length: Longest example, in tokens.
        doc_stride: Tokens from the start of one window to the next; some tools call the overlap so.
        max_question_length: Longest question, in tokens; the rest is cut off.

    DataError if a length leaves no room, or the tokenizer lacks a token or does not give the places of its tokens.
    """

    def __init__(
        self,
        questions: Iterable[Question],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 384,
        doc_stride: int = 128,
        max_question_length: int = 64,
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} does not tell where tokens stand; take a fast tokenizer.")
        room = max_length - SegmentPairs.num_special
        if room <= max_question_length or doc_stride < 1:
            raise DataError(
                f"max_length={max_length}, max_question_length={max_question_length}, doc_stride={doc_stride}: choose "
                f"a max_length over {max_question_length + SegmentPairs.num_special} and a doc_stride of at least 1."
            )
        self.questions: list[Question] = list(questions)
        self._pairs = SegmentPairs(tokenizer)
        contexts = (question["context"] for question in self.questions)
        self._texts = tokenize_distinct(tokenizer, contexts, with_spans=True)
        asked = tokenize_distinct(tokenizer, (question["question"] for question in self.questions))
        self._asked = {text: tokens.ids[:max_question_length] for text, tokens in asked.items()}
        self.windows = [window for index in range(len(self.questions)) for window in self._cut(index, room, doc_stride)]
        if misplaced := [question["id"] for question in self.questions if _is_misplaced(question)]:
            logger.warning(
                f"{len(misplaced)} of {len(self.questions)} questions have an answer that does not stand in the text "
                f"where answer_start says, the first one {misplaced[0]}; they are wrong to train on."
            )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One example: ``input_ids``, ``token_type_ids`` and ``attention_mask``, [S], and the labels, scalars."""
        window = self.windows[index]
        question = self.questions[window.question]
        part = self._texts[question["context"]].ids[window.first : window.first + window.size]
        pair = self._pairs.join(self._asked[question["question"]], part)
        example = {name: torch.tensor(values) for name, values in pair.items()}
        example["attention_mask"] = torch.ones_like(example["input_ids"])
        start, end = self._labels(window)
        return {**example, "start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}

    def text(self, window: Window, start: int, end: int) -> str:
        """The text from token ``start`` to token ``end`` of the example, the latter included."""
        context = self.questions[window.question]["context"]
        spans, shift = self._texts[context].spans, window.first - window.offset
        return context[spans[start + shift][0] : spans[end + shift][1]]

    def _cut(self, index: int, room: int, stride: int) -> Iterator[Window]:
        """The windows of one question."""
        question = self.questions[index]
        asked, num_tokens = self._asked[question["question"]], len(self._texts[question["context"]].ids)
        room -= len(asked)
        stride = min(stride, room)  # no token is skipped
        for first in range(0, max(1, num_tokens - room + stride), stride):
            yield Window(index, first, min(room, num_tokens - first), len(asked) + 2)

    def _labels(self, window: Window) -> tuple[int, int]:
        """Places of the first reference answer's first and last token; 0 and 0, ``[CLS]``, if it is not in there."""
        question = self.questions[window.question]
        answers = question["answers"]
        if not answers["text"]:
            return 0, 0
        spans, start = self._texts[question["context"]].spans, answers["answer_start"][0]
        first = bisect_right(spans, start, key=itemgetter(1))  # the first token that ends after the answer's start
        last = bisect_left(spans, start + len(answers["text"][0]), key=itemgetter(0)) - 1  # begins before its end
        if not window.first <= first <= last < window.first + window.size:
            return 0, 0
        shift = window.offset - window.first
        return first + shift, last + shift


def _is_misplaced(question: Question) -> bool:
    places = zip(question["answers"]["text"], question["answers"]["answer_start"], strict=True)
    return not all(question["context"].startswith(text, start) for text, start in places)


@dataclass(frozen=True)
class Answer:
    """What a model answers to one question."""

    id: str  # of the question
    text: str  # the best answer, even where no answer is more likely; "" only if the text has no tokens
    no_answer_score: float  # score of no answer less that of `text`: the logarithm of the odds that there is none
    candidates: tuple[tuple[str, float], ...]  # the best distinct answers with their scores, the best first

    @property
    def no_answer_probability(self) -> float:
        """Probability of no answer, in the choice between none and ``text``."""
        return 1 / (1 + exp(-self.no_answer_score)) if self.no_answer_score > -700 else 0.0  # where exp overflows


def find_answers(
    windows: QuestionWindows,
    start_logits: Logits,
    end_logits: Logits,
    *,
    num_candidates: int = 20,
    max_answer_length: int = 30,
) -> list[Answer]:
    """The answer to each question, in the order of the questions.

    The score of a span is the sum of its start's and its end's logits, that of no answer the sum of those of ``[CLS]``.
    Logits are [W, S], by window; what is beyond a window's length is ignored. ``num_candidates`` is the number of spans
    per window, and of candidates per question; ``max_answer_length`` is in tokens.
    """
    spans: list[list[tuple[float, str]]] = [[] for _ in windows.questions]
    no_answer = [inf] * len(spans)  # the lowest over a question's windows: one of them may contain the answer
    for window, starts, ends in zip(windows.windows, start_logits, end_logits, strict=True):
        no_answer[window.question] = min(no_answer[window.question], float(starts[0]) + float(ends[0]))
        inside = slice(window.offset, window.offset + window.size)
        for score, start, end in _best_spans(starts[inside], ends[inside], num_candidates, max_answer_length):
            text = windows.text(window, start + window.offset, end + window.offset)
            spans[window.question].append((score, text))
    answers = []
    for question, found, no_answer_logit in zip(windows.questions, spans, no_answer, strict=True):
        best: dict[str, float] = {}
        for score, text in sorted(found, key=lambda span: -span[0]):
            best.setdefault(text, score)
        candidates = tuple(islice(best.items(), num_candidates))
        text, score = candidates[0] if candidates else ("", -inf)
        answers.append(Answer(question["id"], text, no_answer_logit - score, candidates))
    return answers


def _best_spans(starts: Logits, ends: Logits, num_spans: int, max_length: int) -> Iterator[tuple[float, int, int]]:
    """The spans with the highest scores: score, first and last token. The logits are [T]."""
    if not len(starts):
        return
    beyond = np.full(max_length - 1, -inf)
    # Row i: the logits of an end at i, i + 1, ...; [T, max_length].
    ends_from = np.lib.stride_tricks.sliding_window_view(np.concatenate([ends, beyond]), max_length)
    scores = (starts[:, None] + ends_from).ravel()
    highest = np.argpartition(-scores, min(num_spans, len(scores) - 1))[:num_spans]
    for index in highest[np.argsort(-scores[highest], kind="stable")].tolist():
        if scores[index] > -inf:
            start, length = divmod(index, max_length)
            yield float(scores[index]), start, start + length
