"""Accuracy: the share of the examples whose class is predicted; the paper's metric for MNLI and QQP."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

_DESCRIPTION = "Share of the examples whose predicted class is the reference class."
_INPUTS = """
Args:
    predictions: predicted classes, integers.
    references: the right ones.
Returns:
    accuracy: in [0, 1].
"""
_CITATION = ""


class Accuracy(evaluate.Metric):
    """The metric; see the module's docstring."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        num_right = sum(predicted == right for predicted, right in zip(predictions, references, strict=True))
        return {"accuracy": num_right / len(references)}
