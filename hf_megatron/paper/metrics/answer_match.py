"""How well an answer matches the reference answers: exact match and F1, by SQuAD's official definitions.

Scores are in [0, 1]. The two versions differ where an answer is empty once normalised: SQuAD 1.1 gives it an F1 of 0,
2.0 an F1 of 1 if the reference is empty as well.

Source: the evaluation scripts of SQuAD 1.1 (Rajpurkar et al. 2016, arXiv:1606.05250) and 2.0 (Rajpurkar et al. 2018,
arXiv:1806.03822).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import List, Value

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

PREDICTION: Mapping[str, Any] = {"id": Value("string"), "prediction_text": Value("string")}
REFERENCE: Mapping[str, Any] = {
    "id": Value("string"),
    "answers": {"text": List(Value("string")), "answer_start": List(Value("int64"))},
}


def normalise(answer: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 if the two are equal once normalised, else 0."""
    return float(normalise(prediction) == normalise(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of the two, as in SQuAD 1.1."""
    predicted, expected = normalise(prediction).split(), normalise(reference).split()
    num_common = (Counter(predicted) & Counter(expected)).total()
    if not num_common:
        return 0.0
    precision, recall = num_common / len(predicted), num_common / len(expected)
    return 2 * precision * recall / (precision + recall)


def token_f1_v2(prediction: str, reference: str) -> float:
    """As :func:`token_f1`, but 1 if both are empty once normalised, as in SQuAD 2.0."""
    if not normalise(prediction) or not normalise(reference):
        return exact_match(prediction, reference)
    return token_f1(prediction, reference)


def best_over_references(score: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """The highest score of a prediction against any of its reference answers, of which there is at least one."""
    return max(score(prediction, reference) for reference in references)
