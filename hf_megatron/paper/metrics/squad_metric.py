"""SQuAD 1.1: exact match and F1, by the definitions of the official script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features

from hf_megatron.errors import DataError
from hf_megatron.paper.metrics.answer_match import PREDICTION, REFERENCE, best_over_references, exact_match, token_f1


class Squad(evaluate.Metric):
    """Exact match and word F1 of predicted answers, each against the best of its reference answers."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Rajpurkar et al. 2016, SQuAD: 100,000+ Questions for Machine Comprehension of Text. EMNLP.",
            inputs_description=self._compute.__doc__,
            features=Features({"predictions": PREDICTION, "references": REFERENCE}),
        )

    def _compute(self, predictions: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]) -> dict[str, float]:
        """``exact_match`` and ``f1``, in percent; a question without a prediction counts as wrong, as officially.

        Args:
            predictions: ``{"id": the question's id, "prediction_text": the answer}``.
            references: ``{"id": ..., "answers": {"text": [...], "answer_start": [...]}}``, in the same order.
        """
        answers = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
        exact = f1 = 0.0
        for reference in references:
            answer, texts = answers.get(reference["id"]), reference["answers"]["text"]
            if not texts:
                raise DataError(f"question {reference['id']} has no reference answer; take the metric squad_v2.")
            if answer is not None:
                exact += best_over_references(exact_match, answer, texts)
                f1 += best_over_references(token_f1, answer, texts)
        return {"exact_match": 100 * exact / len(references), "f1": 100 * f1 / len(references)}
