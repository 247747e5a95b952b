"""RACE: accuracy over all questions, and of the middle-school and high-school levels, as the paper's table 5 has it."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

_DESCRIPTION = "Share of the questions whose option is predicted: all of them, and each level's."
_INPUTS = """
Args:
    predictions: chosen options, integers.
    references: {"option": the right option, "level": "middle" or "high"} for each.
Returns:
    accuracy, and accuracy_middle and accuracy_high of the levels that occur; in [0, 1].
"""
_CITATION = """\
@inproceedings{lai2017race,
    title={RACE: Large-scale ReAding Comprehension Dataset From Examinations},
    author={Lai, Guokun and Xie, Qizhe and Liu, Hanxiao and Yang, Yiming and Hovy, Eduard},
    booktitle={EMNLP},
    year={2017}
}
"""


class Race(evaluate.Metric):
    """The metric; see the module's docstring."""

    def _info(self) -> evaluate.MetricInfo:
        reference = {"option": datasets.Value("int64"), "level": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": reference}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[dict[str, object]]) -> dict[str, float]:
        is_right: dict[str, list[bool]] = {"accuracy": []}
        for predicted, reference in zip(predictions, references, strict=True):
            for group in ("accuracy", f"accuracy_{reference['level']}"):
                is_right.setdefault(group, []).append(predicted == reference["option"])
        return {group: sum(outcomes) / len(outcomes) for group, outcomes in is_right.items()}
