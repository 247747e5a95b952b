"""How an answer in words compares with the reference answers: SQuAD's official definitions.

Source: the evaluation scripts of SQuAD 1.1 (Rajpurkar et al. 2016, arXiv:1606.05250) and 2.0 (Rajpurkar et al. 2018,
arXiv:1806.03822). They differ where an answer is empty once normalised: 1.1 gives it an F1 of 0, and 2.0 an F1 of 1 if
the reference is empty as well. Scores are in [0, 1].
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


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
    """As :func:`token_f1`; of two answers of which one is empty the score is 1 if both are, as in SQuAD 2.0."""
    if not normalise(prediction) or not normalise(reference):
        return exact_match(prediction, reference)
    return token_f1(prediction, reference)


def best_over_references(score: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """The highest score of a prediction against any of several reference answers, of which there is at least one."""
    return max(score(prediction, reference) for reference in references)


def best_threshold(
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    no_answer_probabilities: Mapping[str, float],
    is_answerable: Mapping[str, bool],
) -> tuple[float, float]:
    """The no-answer threshold that would have given the highest mean score.

    The questions are gone through from the one most surely answerable on. Those with equal probabilities come in the
    order of the mapping, one at a time, as in the official script, so that the score may be one that no threshold gives
    when probabilities repeat.

    Args:
        scores: Score of each prediction, by question id.
        predictions: The answers; "" if the prediction is that there is none.
        no_answer_probabilities: How sure it is that a question has no answer; any increasing measure will do.
        is_answerable: Whether the question has an answer, by the references.

    Returns:
        The mean score, and the threshold above which a question counts as predicted to have no answer. It is 0 if the
        best is to answer nothing.
    """
    current = best = float(sum(not is_answerable[question] for question in scores))  # all predicted to have no answer
    threshold = 0.0
    for question in sorted(no_answer_probabilities, key=lambda question: no_answer_probabilities[question]):
        if question not in scores:
            continue
        if is_answerable[question]:
            current += scores[question]
        elif predictions[question]:
            current -= 1
        if current > best:
            best, threshold = current, no_answer_probabilities[question]
    return best / len(scores), threshold
