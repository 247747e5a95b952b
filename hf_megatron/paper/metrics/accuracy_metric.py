"""Accuracy, the paper's metric for MNLI and QQP."""

from __future__ import annotations

from collections.abc import Sequence

import evaluate
from datasets import Features, Value


class Accuracy(evaluate.Metric):
    """Share of the examples whose predicted class is the reference class."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self._compute.__doc__,
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        """The ``accuracy``, in [0, 1], of the classes ``predictions`` against the right ones, ``references``."""
        num_right = sum(predicted == right for predicted, right in zip(predictions, references, strict=True))
        return {"accuracy": num_right / len(references)}
