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
        """Evaluate a model.

        Args:
            data: The content of a wiki.*.tokens file, as one string or as its lines, in order.
            model: A causal language model that transformers has loaded.
            tokenizer: Its tokenizer.
            **options: As for hf_megatron.paper.evaluation.evaluate_wikitext103.

        Returns:
            perplexity, loss, tokens, original_tokens, examples, window, stride, seconds.
        """
        return vars(evaluate_wikitext103(model, tokenizer, "".join(data), **options))
