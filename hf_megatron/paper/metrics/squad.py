"""SQuAD 1.1: exact match and F1, by the definitions of the official script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hf_megatron.errors import DataError
from hf_megatron.paper.metrics.answers import best_over_references, exact_match, token_f1

_DESCRIPTION = "Exact match and word F1 of predicted answers, each against the best of its reference answers."
_INPUTS = """
Args:
    predictions: {"id": the question's id, "prediction_text": the answer}.
    references: {"id": the question's id, "answers": {"text": [...], "answer_start": [...]}}, in the same order.
Returns:
    exact_match and f1, in percent.
"""
_CITATION = """\
@inproceedings{rajpurkar2016squad,
    title={SQuAD: 100,000+ Questions for Machine Comprehension of Text},
    author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
    booktitle={EMNLP},
    year={2016}
}
"""


class Squad(evaluate.Metric):
    """The metric; see the module's docstring."""

    def _info(self) -> evaluate.MetricInfo:
        text, start = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")},
                    "references": {
                        "id": datasets.Value("string"),
                        "answers": {"text": text, "answer_start": start},
                    },
                }
            ),
        )

    def _compute(self, predictions: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]) -> dict[str, float]:
        answers = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
        exact = f1 = 0.0
        for reference in references:
            # A question without a prediction counts as wrong, as in the official script.
            answer, texts = answers.get(reference["id"]), reference["answers"]["text"]
            if not texts:
                raise DataError(f"question {reference['id']} has no reference answer; take the metric squad_v2.")
            if answer is not None:
                exact += best_over_references(exact_match, answer, texts)
                f1 += best_over_references(token_f1, answer, texts)
        return {"exact_match": 100 * exact / len(references), "f1": 100 * f1 / len(references)}
