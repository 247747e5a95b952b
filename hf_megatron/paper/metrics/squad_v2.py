"""SQuAD 2.0: exact match and F1 where questions may have no answer, by the definitions of the official script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hf_megatron.paper.metrics.answers import best_over_references, best_threshold, exact_match, normalise, token_f1_v2

_DESCRIPTION = "Exact match and word F1 of predicted answers, where the right answer may be that there is none."
_INPUTS = """
Args:
    predictions: {"id": the question's id, "prediction_text": the answer, "" for none,
        "no_answer_probability": how sure it is that there is none; any increasing measure, 0.0 if there is no such}.
    references: {"id": the question's id, "answers": {"text": [...], "answer_start": [...]}}, in the same order; the
        lists are empty if there is no answer.
    no_answer_threshold: a question with a higher probability counts as predicted to have no answer.
Returns:
    exact, f1 and total; the same with HasAns_ of the answerable questions and with NoAns_ of the others; best_exact,
    best_exact_thresh, best_f1 and best_f1_thresh at the best thresholds. Scores are in percent.
"""
_CITATION = """\
@inproceedings{rajpurkar2018know,
    title={Know What You Don't Know: Unanswerable Questions for SQuAD},
    author={Rajpurkar, Pranav and Jia, Robin and Liang, Percy},
    booktitle={ACL},
    year={2018}
}
"""


class SquadV2(evaluate.Metric):
    """The metric; see the module's docstring."""

    def _info(self) -> evaluate.MetricInfo:
        text, start = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": {
                        "id": datasets.Value("string"),
                        "prediction_text": datasets.Value("string"),
                        "no_answer_probability": datasets.Value("float64"),
                    },
                    "references": {
                        "id": datasets.Value("string"),
                        "answers": {"text": text, "answer_start": start},
                    },
                }
            ),
        )

    def _compute(
        self,
        predictions: Sequence[dict[str, Any]],
        references: Sequence[dict[str, Any]],
        no_answer_threshold: float = 1.0,
    ) -> dict[str, float]:
        answers = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
        probabilities = {prediction["id"]: prediction["no_answer_probability"] for prediction in predictions}
        is_answerable = {reference["id"]: bool(reference["answers"]["text"]) for reference in references}
        results: dict[str, float] = {}
        for name, score in (("exact", exact_match), ("f1", token_f1_v2)):
            raw = {}
            for reference in references:
                # Questions without a prediction are left out, as in the official script, which prints a warning.
                if reference["id"] in answers:
                    # A reference that is empty once normalised, such as an article, is none.
                    texts = [text for text in reference["answers"]["text"] if normalise(text)]
                    raw[reference["id"]] = best_over_references(score, answers[reference["id"]], texts or [""])
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
