"""LAMBADA accuracy as an ``evaluate`` measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value

from hf_megatron.paper.evaluation import evaluate_lambada


class Lambada(evaluate.Measurement):
    """Share of the passages whose last word is predicted, all of its sub-words, with teacher forcing."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=self.__doc__,
            citation="Paperno et al. 2016, The LAMBADA dataset. ACL. arXiv:1606.06031",
            inputs_description=self._compute.__doc__,
            features=Features({"data": Value("string")}),
        )

    def _compute(self, data: Sequence[str], model: Any, tokenizer: Any, **options: Any) -> dict[str, Any]:
        """Call ``evaluate_lambada(model, tokenizer, data, **options)``; data are the passages, last word included."""
        return vars(evaluate_lambada(model, tokenizer, data, **options))
