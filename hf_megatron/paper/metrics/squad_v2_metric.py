"""SQuAD 2.0: exact match and F1 where questions may have no answer, by the definitions of the official script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import evaluate
from datasets import Features, Value

from hf_megatron.paper.metrics import answer_match
from hf_megatron.paper.metrics.answer_match import PREDICTION, REFERENCE, normalise


class SquadV2(evaluate.Metric):
    """Exact match and word F1 of predicted answers, where the right answer may be that there is none."""

    def _info(self) -> evaluate.MetricInfo:
        prediction = {**PREDICTION, "no_answer_probability": Value("float64")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Rajpurkar et al. 2018, Know What You Don't Know: Unanswerable Questions for SQuAD. ACL.",
            inputs_description=self._compute.__doc__,
            features=Features({"predictions": prediction, "references": REFERENCE}),
        )

    def _compute(
        self,
        predictions: Sequence[dict[str, Any]],
        references: Sequence[dict[str, Any]],
        no_answer_threshold: float = 1.0,
    ) -> dict[str, float]:
        """The scores, in percent; questions without a prediction are left out, as in the official script.

        Args:
            predictions: ``{"id": the question's id, "prediction_text": the answer, "" for none,
                "no_answer_probability": any measure that grows with it, 0.0 if there is none}``.
            references: ``{"id": ..., "answers": {"text": [...], "answer_start": [...]}}``, in the same order; the lists
                are empty if there is no answer.
            no_answer_threshold: A question with a higher probability counts as predicted to have no answer.

        Returns:
            exact, f1 and total; the same with HasAns_ of the answerable questions and with NoAns_ of the others;
            best_exact, best_exact_thresh, best_f1 and best_f1_thresh at the best thresholds.
        """
        answers = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
        probabilities = {prediction["id"]: prediction["no_answer_probability"] for prediction in predictions}
        texts = {row["id"]: row["answers"]["text"] for row in references if row["id"] in answers}
        is_answerable = {question: bool(found) for question, found in texts.items()}
        # A reference that is empty once normalised, such as an article, is none.
        expected = {question: [text for text in found if normalise(text)] or [""] for question, found in texts.items()}
        results: dict[str, float] = {}
        for name, score in (("exact", answer_match.exact_match), ("f1", answer_match.token_f1_v2)):
            raw = {q: answer_match.best_over_references(score, answers[q], expected[q]) for q in expected}
            scores = {
                question: float(not is_answerable[question]) if probabilities[question] > no_answer_threshold else value
                for question, value in raw.items()
            }
            for prefix, kinds in (("", {True, False}), ("HasAns_", {True}), ("NoAns_", {False})):
                chosen = [value for question, value in scores.items() if is_answerable[question] in kinds]
                if chosen:
                    results[f"{prefix}{name}"] = 100 * sum(chosen) / len(chosen)
                    results[f"{prefix}total"] = len(chosen)
            best, threshold = best_threshold(raw, answers, probabilities, is_answerable)
            results |= {f"best_{name}": 100 * best, f"best_{name}_thresh": threshold}
        return results


def best_threshold(
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    no_answer_probabilities: Mapping[str, float],
    is_answerable: Mapping[str, bool],
) -> tuple[float, float]:
    """The highest mean score over no-answer thresholds, and that threshold; all mappings are by question id.

    The threshold is 0 if the best is to answer nothing. Questions with equal probabilities are taken one at a time, in
    the order of the mapping, as in the official script, so that no threshold may give the score if they repeat.
    """
    order = [question for question in no_answer_probabilities if question in scores]
    order.sort(key=lambda question: no_answer_probabilities[question])
    none_answered = float(sum(not is_answerable[question] for question in scores))
    gains = (scores[question] if is_answerable[question] else -bool(predictions[question]) for question in order)
    totals = list(accumulate(gains, initial=none_answered))
    num_answered = max(range(len(totals)), key=totals.__getitem__)
    return totals[num_answered] / len(scores), no_answer_probabilities[order[num_answered - 1]] if num_answered else 0.0
