"""The metrics of the fine-tuning tasks, loaded as evaluate modules, against a slow restatement of the definitions."""

import random
import socket
from typing import Any

import evaluate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_megatron.errors import DataError
from hf_megatron.paper.metrics import metric_path
from hf_megatron.paper.metrics.answer_match import exact_match, normalise, token_f1, token_f1_v2

_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def _slow_words(text: str) -> list[str]:
    """The words of a normalised answer. An article is one that no letter, digit or underscore touches."""
    kept = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    pieces, run = "", ""
    for character in [*kept, " "]:
        if character.isalnum() or character == "_":
            run += character
        else:
            pieces += (" " if run in ("a", "an", "the") else run) + character
            run = ""
    return pieces.split()


def _slow_f1(prediction: str, reference: str) -> float:
    words, expected = _slow_words(prediction), _slow_words(reference)
    num_common = sum(min(words.count(word), expected.count(word)) for word in set(words))
    return 0.0 if num_common == 0 else 2 * num_common / (len(words) + len(expected))


def _slow_squad(predictions: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
    exact = [max(_slow_words(predictions[q]) == _slow_words(t) for t in texts) for q, texts in references.items()]
    f1 = [max(_slow_f1(predictions[q], t) for t in texts) for q, texts in references.items()]
    return {"exact_match": 100 * sum(exact) / len(exact), "f1": 100 * sum(f1) / len(f1)}


def _slow_squad_v2(
    predictions: dict[str, str], probabilities: dict[str, float], references: dict[str, list[str]], threshold: float
) -> dict[str, float]:
    results: dict[str, float] = {}
    for name, score in (("exact", exact_match), ("f1", token_f1_v2)):
        raw, final = {}, {}
        for question, texts in references.items():
            wanted = [text for text in texts if _slow_words(text)] or [""]
            raw[question] = max(score(predictions[question], text) for text in wanted)
            no_answer = 0.0 if texts else 1.0
            final[question] = no_answer if probabilities[question] > threshold else raw[question]
        for prefix, group in (
            ("", list(references)),
            ("HasAns_", [q for q, texts in references.items() if texts]),
            ("NoAns_", [q for q, texts in references.items() if not texts]),
        ):
            if group:
                results[f"{prefix}{name}"] = 100 * sum(final[q] for q in group) / len(group)
                results[f"{prefix}total"] = len(group)
        # The best of: the k questions most surely answerable are answered, the others are not.
        order = sorted(probabilities, key=probabilities.__getitem__)
        totals = []
        for k in range(len(order) + 1):
            answered = [raw[q] if references[q] else float(predictions[q] == "") for q in order[:k]]
            totals.append(sum(answered) + sum(not references[q] for q in order[k:]))
        best = max(totals)
        first = next(k for k, total in enumerate(totals) if total > best - 1e-9)
        results[f"best_{name}"] = 100 * best / len(order)
        results[f"best_{name}_thresh"] = probabilities[order[first - 1]] if first else 0.0
    return results


_ANSWERS = ["The 308", "308", "a an the", "Denver Broncos", "denver  broncos!", "x86_64", "its (own) the-end", "\u00c9"]
_LETTERS = st.text(alphabet="aAn theTHE.,-'_ \n\t1\u00e9\u00bd", max_size=30)


def _perturbed(text: str, draw: random.Random) -> str:
    words = text.split() or ["nothing"]
    kind = draw.randrange(4)
    if kind == 0:
        return " ".join(words[:-1])
    if kind == 1:
        return " ".join([*words, "the", draw.choice(_ANSWERS)])
    return text.upper() + "." if kind == 2 else " ".join(draw.sample(words, len(words)))


def _questions(kind: str, seed: int = 0) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Predictions of a kind for 60 questions with one to three reference answers, one of them sometimes an article."""
    draw = random.Random(seed)
    references = {f"q{i}": draw.sample(_ANSWERS, draw.randint(1, 3)) for i in range(60)}
    make = {
        "random": lambda texts: draw.choice(_ANSWERS),
        "empty": lambda texts: "",
        "exact": lambda texts: texts[-1],
        "perturbed": lambda texts: _perturbed(texts[0], draw),
    }[kind]
    return {question: make(texts) for question, texts in references.items()}, references


def _rows(references: dict[str, list[str]]) -> list[dict[str, Any]]:
    return [{"id": q, "answers": {"text": t, "answer_start": [0] * len(t)}} for q, t in references.items()]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", None)


@settings(deadline=None)
@given(prediction=_LETTERS, reference=_LETTERS)
def test_words_and_f1(prediction: str, reference: str) -> None:
    """Catches articles cut out of words, punctuation taken for white space, and words counted too often."""
    assert normalise(prediction).split() == _slow_words(prediction)
    assert exact_match(prediction, reference) == (_slow_words(prediction) == _slow_words(reference))
    assert token_f1(prediction, reference) == pytest.approx(_slow_f1(prediction, reference))


def test_what_is_empty_once_normalised() -> None:
    """Catches one definition of F1 for both versions: two empty answers have 0 in SQuAD 1.1 and 1 in SQuAD 2.0."""
    assert (token_f1("The.", "a"), token_f1_v2("The.", "a")) == (0.0, 1.0)
    assert (token_f1("", "word"), token_f1_v2("", "word")) == (0.0, 0.0)
    assert normalise("  The\u2014cat, an end.\n") == "\u2014cat end"


@pytest.mark.parametrize("kind", ["random", "empty", "exact", "perturbed"])
def test_squad(kind: str) -> None:
    """Catches a mean over the wrong number, the first reference for the best, shares for percent, 2.0 taken for 1.1."""
    predictions, references = _questions(kind)
    metric = evaluate.load(metric_path("squad"))
    rows = [{"id": question, "prediction_text": text} for question, text in predictions.items()]
    scores = metric.compute(predictions=rows, references=_rows(references))
    assert scores == pytest.approx(_slow_squad(predictions, references))
    with pytest.raises(DataError, match="question q has no reference answer; take the metric squad_v2"):
        metric.compute(predictions=[{"id": "q", "prediction_text": "x"}], references=_rows({"q": []}))


@pytest.mark.parametrize("kind", ["random", "empty", "exact", "perturbed"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
def test_squad_v2(kind: str, threshold: float, repeated: bool) -> None:
    """Catches answers of one group counted in another, and a best threshold found on scores that one was applied to."""
    predictions, references = _questions(kind, seed=1)
    draw = random.Random(2)
    for question in references:
        if draw.random() < 0.5:
            references[question] = []
    probabilities = {question: round(draw.random(), 1 if repeated else 9) for question in predictions}
    rows = [
        {"id": question, "prediction_text": text, "no_answer_probability": probabilities[question]}
        for question, text in predictions.items()
    ]
    metric = evaluate.load(metric_path("squad_v2"))
    scores = metric.compute(predictions=rows, references=_rows(references), no_answer_threshold=threshold)
    assert scores == pytest.approx(_slow_squad_v2(predictions, probabilities, references, threshold))


def test_squad_v2_with_answerable_questions_only() -> None:
    """Catches a division by the number of questions of a kind that does not occur."""
    rows = [{"id": "q", "prediction_text": "x", "no_answer_probability": 0.1}]
    scores = evaluate.load(metric_path("squad_v2")).compute(predictions=rows, references=_rows({"q": ["x"]}))
    expected = {f"{prefix}{name}": 100.0 for prefix in ("", "HasAns_", "best_") for name in ("exact", "f1")}
    expected |= {"total": 1, "HasAns_total": 1, "best_exact_thresh": 0.1, "best_f1_thresh": 0.1}
    assert scores == expected


def test_accuracy_and_that_of_race_by_level() -> None:
    """Catches levels that are mixed up, and a mean of the levels in place of that of the questions."""
    levels = ["middle", "high", "high", "high"]
    references = [{"option": option, "level": level} for option, level in zip([0, 1, 2, 3], levels, strict=True)]
    metric = evaluate.load(metric_path("race"))
    scores = metric.compute(predictions=[0, 0, 2, 3], references=references)
    assert scores == {"accuracy": 0.75, "accuracy_middle": 1.0, "accuracy_high": pytest.approx(2 / 3)}
    assert metric.compute(predictions=[0], references=references[:1]) == {"accuracy": 1.0, "accuracy_middle": 1.0}
    metric = evaluate.load(metric_path("accuracy"))
    assert metric.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}


def test_unknown_metrics_are_refused() -> None:
    """Catches a path to a file that does not exist."""
    with pytest.raises(DataError, match="no metric 'bleu' in this package; choose one of accuracy, race, squad"):
        metric_path("bleu")
