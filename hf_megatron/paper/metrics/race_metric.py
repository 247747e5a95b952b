"""RACE: accuracy over all questions, and of the middle-school and high-school levels, as in the paper's table 5."""

from __future__ import annotations

from collections.abc import Sequence

import evaluate
from datasets import Features, Value


class Race(evaluate.Metric):
    """Share of the questions whose option is predicted, over all and for each level."""

    def _info(self) -> evaluate.MetricInfo:
        reference = {"option": Value("int64"), "level": Value("string")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Lai et al. 2017, RACE: Large-scale ReAding Comprehension Dataset From Examinations. EMNLP.",
            inputs_description=self._compute.__doc__,
            features=Features({"predictions": Value("int64"), "references": reference}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[dict[str, object]]) -> dict[str, float]:
        """The ``accuracy``, and ``accuracy_middle`` and ``accuracy_high`` of the levels that occur, in [0, 1].

        Args:
            predictions: Chosen options.
            references: ``{"option": the right option, "level": "middle" or "high"}`` for each.
        """
        is_right: dict[str, list[bool]] = {"accuracy": []}
        for predicted, reference in zip(predictions, references, strict=True):
            for group in ("accuracy", f"accuracy_{reference['level']}"):
                is_right.setdefault(group, []).append(predicted == reference["option"])
        return {group: sum(outcomes) / len(outcomes) for group, outcomes in is_right.items()}
