"""WikiText-103 perplexity as an ``evaluate`` measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value

from hf_megatron.paper.evaluation import evaluate_wikitext103


class Wikitext103(evaluate.Measurement):
    """Perplexity over windows of 1024 tokens that advance by 32, normalised by the original tokens."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=self.__doc__,
            citation="Shoeybi et al. 2019, Megatron-LM. arXiv:1909.08053",
            inputs_description=self._compute.__doc__,
            features=Features({"data": Value("string")}),
        )

    def _compute(self, data: Sequence[str], model: Any, tokenizer: Any, **options: Any) -> dict[str, Any]:
        """Call ``evaluate_wikitext103(model, tokenizer, data, **options)``; data is a file's text, or its lines."""
        return vars(evaluate_wikitext103(model, tokenizer, "".join(data), **options))
