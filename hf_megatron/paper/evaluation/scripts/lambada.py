"""LAMBADA accuracy by the protocol of Megatron-LM's paper, as an ``evaluate`` measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hf_megatron.paper.evaluation import evaluate_lambada

_DESCRIPTION = "Share of the passages whose last word is predicted, all of its sub-words, with teacher forcing."
_INPUTS = """
Args:
    data: passages, last word included.
    model: a causal language model that transformers has loaded.
    tokenizer: its tokenizer.
    batch_size, show_progress: as for hf_megatron.paper.evaluation.evaluate_lambada.
Returns:
    accuracy, perplexity, tokens, examples, seconds.
"""
_CITATION = """\
@inproceedings{paperno2016lambada,
    title={The LAMBADA dataset: Word prediction requiring a broad discourse context},
    author={Paperno, Denis and Kruszewski, Germ{\\'a}n and Lazaridou, Angeliki and Pham, Ngoc Quan and
            Bernardi, Raffaella and Pezzelle, Sandro and Baroni, Marco and Boleda, Gemma and Fern{\\'a}ndez, Raquel},
    booktitle={ACL},
    year={2016}
}
"""


class Lambada(evaluate.Measurement):
    """The measurement; see the module's docstring."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _compute(self, data: Sequence[str], model: Any, tokenizer: Any, **options: Any) -> dict[str, Any]:
        return vars(evaluate_lambada(model, tokenizer, data, **options))
