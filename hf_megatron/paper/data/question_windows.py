"""Questions on texts to examples for ``MegatronBertForQuestionAnswering``: ``[CLS] question [SEP] text [SEP]``.

A text that is too long becomes several examples, windows that advance by ``doc_stride`` tokens. A window's labels are
the places of the answer's first and last token, or those of ``[CLS]`` if the answer does not lie in it.

Source: Devlin et al. 2018, arXiv:1810.04805, sections 4.2 and 4.3, and the defaults of its published code.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_megatron.errors import DataError
from hf_megatron.paper.data.special_tokens import special_token_id
from hf_megatron.paper.data.squad import Question

logger = logging.get_logger(__name__)

_NUM_SPECIAL = 3  # [CLS] question [SEP] text [SEP]


@dataclass(frozen=True)
class _Text:
    """Token ids, and for each token its first character and the one after its last."""

    token_ids: list[int]
    starts: list[int]
    ends: list[int]


@dataclass(frozen=True)
class Window:
    """A part of a question's text.

    Attributes:
        question: Index of the question.
        first: Index of the window's first token in the text.
        size: Number of the text's tokens in it.
        offset: Index of the window's first token in the example, behind ``[CLS] question [SEP]``.
    """

    question: int
    first: int
    size: int
    offset: int


class QuestionWindows(Dataset[dict[str, torch.Tensor]]):
    """A data set of windows, which are put together when they are asked for.

    Args:
        questions: Rows as :func:`read_squad` gives them, or SQuAD's rows from the Hub.
        tokenizer: A fast BERT tokenizer.
        max_length: Longest example, in tokens.
        doc_stride: Tokens by which a window is ahead of the one before it; not the overlap, which some tools call so.
        max_question_length: Longest question, in tokens; the rest is cut off.

    Raises:
        DataError: A length leaves no room, or the tokenizer lacks a token or does not know where its tokens stand.
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
        if max_length <= max_question_length + _NUM_SPECIAL or doc_stride < 1:
            raise DataError(
                f"max_length={max_length}, max_question_length={max_question_length}, doc_stride={doc_stride}: choose "
                f"a max_length over {max_question_length + _NUM_SPECIAL} and a doc_stride of at least 1."
            )
        self.questions: list[Question] = list(questions)
        self._cls, self._sep = special_token_id(tokenizer, "cls"), special_token_id(tokenizer, "sep")
        self._texts = _tokenize(tokenizer, (question["context"] for question in self.questions))
        asked = _tokenize(tokenizer, (question["question"] for question in self.questions))
        self._asked = {text: tokens.token_ids[:max_question_length] for text, tokens in asked.items()}
        self.windows = [
            window
            for index in range(len(self.questions))
            for window in self._windows_of(index, max_length - _NUM_SPECIAL, doc_stride)
        ]
        self._warn_of_misplaced_answers()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One example: ``input_ids``, ``token_type_ids`` and ``attention_mask``, [S], and the labels, scalars."""
        window = self.windows[index]
        question = self.questions[window.question]
        part = self._texts[question["context"]].token_ids[window.first : window.first + window.size]
        input_ids = [self._cls, *self._asked[question["question"]], self._sep, *part, self._sep]
        start, end = self._label(window)
        return {
            "input_ids": torch.tensor(input_ids),
            "token_type_ids": (torch.arange(len(input_ids)) >= window.offset).long(),
            "attention_mask": torch.ones(len(input_ids), dtype=torch.long),
            "start_positions": torch.tensor(start),
            "end_positions": torch.tensor(end),
        }

    def text(self, window: Window, start: int, end: int) -> str:
        """The words of the text from token ``start`` to token ``end`` of the example, the latter included."""
        context = self.questions[window.question]["context"]
        tokens, shift = self._texts[context], window.first - window.offset
        return context[tokens.starts[start + shift] : tokens.ends[end + shift]]

    def _windows_of(self, index: int, room: int, stride: int) -> Iterable[Window]:
        question = self.questions[index]
        asked, num_tokens = self._asked[question["question"]], len(self._texts[question["context"]].token_ids)
        room -= len(asked)
        stride = min(stride, room)  # no token is skipped
        for first in range(0, max(1, num_tokens - room + stride), stride):
            yield Window(index, first, min(room, num_tokens - first), len(asked) + 2)

    def _label(self, window: Window) -> tuple[int, int]:
        """Places of the first reference answer's first and last token; 0 and 0, ``[CLS]``, if it is not in there."""
        question = self.questions[window.question]
        answers = question["answers"]
        if not answers["text"]:
            return 0, 0
        tokens, start = self._texts[question["context"]], answers["answer_start"][0]
        first = bisect_right(tokens.ends, start)  # the first token that ends behind the answer's first character
        last = bisect_left(tokens.starts, start + len(answers["text"][0])) - 1  # the last that begins in the answer
        if not window.first <= first <= last < window.first + window.size:
            return 0, 0
        shift = window.offset - window.first
        return first + shift, last + shift

    def _warn_of_misplaced_answers(self) -> None:
        misplaced = [question["id"] for question in self.questions if not _is_in_place(question)]
        if misplaced:
            logger.warning(
                f"{len(misplaced)} of {len(self.questions)} questions have an answer that does not stand in the text "
                f"where answer_start says, the first one {misplaced[0]}; they are wrong to train on."
            )


def _is_in_place(question: Question) -> bool:
    answers, context = question["answers"], question["context"]
    return all(
        context.startswith(text, start) for text, start in zip(answers["text"], answers["answer_start"], strict=True)
    )


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, _Text]:
    """Each different text's tokens, without special ones; several questions share a text."""
    distinct: Sequence[str] = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    # What is too long for the model is cut up later: verbose=False leaves out the warning about it.
    encoded = tokenizer(distinct, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return {
        text: _Text(token_ids, [start for start, _ in offsets], [end for _, end in offsets])
        for text, token_ids, offsets in zip(distinct, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    }
