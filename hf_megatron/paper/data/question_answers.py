"""From the logits of a question-answering model to answers in words.

The score of a span is the sum of its start's and its end's logits, and that of no answer is the sum of those of
``[CLS]``.

Source: Devlin et al. 2018, arXiv:1810.04805, sections 4.2 and 4.3.

Shapes: W windows, S sequence, T tokens of a window's text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import exp, inf

import numpy as np
from numpy.typing import NDArray

from hf_megatron.paper.data.question_windows import QuestionWindows

Logits = NDArray[np.floating]


@dataclass(frozen=True)
class Answer:
    """What a model answers to one question.

    Attributes:
        id: The question's id.
        text: The best answer in words, whether or not the model takes the question for answerable; "" only if the text
            has no tokens.
        no_answer_score: Score of no answer less that of ``text``, the logarithm of the odds that there is none.
        candidates: The best answers with their scores, the best first, each text once.
    """

    id: str
    text: str
    no_answer_score: float
    candidates: tuple[tuple[str, float], ...]

    @property
    def no_answer_probability(self) -> float:
        """Probability that there is no answer, of the choice between none and ``text``."""
        score = self.no_answer_score
        return 1 / (1 + exp(-score)) if score > -700 else 0.0  # where exp would overflow


def find_answers(
    windows: QuestionWindows,
    start_logits: Logits,
    end_logits: Logits,
    *,
    num_candidates: int = 20,
    max_answer_length: int = 30,
) -> list[Answer]:
    """The answer to each question, in the order of the questions.

    Args:
        windows: What the model was asked.
        start_logits: [W, S], of the windows in their order; what is beyond a window's length is not looked at.
        end_logits: [W, S].
        num_candidates: Number of spans to look at in each window, and of candidates to give for each question.
        max_answer_length: Longest answer, in tokens.
    """
    spans: list[list[tuple[float, str]]] = [[] for _ in windows.questions]
    no_answer = [inf] * len(spans)  # of several windows, of which one has the answer, the one that is least sure counts
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
    """The spans of the highest scores, each with its score and its first and last token; of T logits each."""
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
