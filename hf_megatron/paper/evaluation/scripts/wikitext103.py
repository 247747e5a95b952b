"""WikiText-103 perplexity by the protocol of Megatron-LM's paper, as an ``evaluate`` measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hf_megatron.paper.evaluation import evaluate_wikitext103

_DESCRIPTION = "Perplexity over windows of 1024 tokens that advance by 32, normalised by the original tokens."
_INPUTS = """
Args:
    data: the content of a wiki.*.tokens file, as one string or as its lines, in order.
    model: a causal language model that transformers has loaded.
    tokenizer: its tokenizer.
    window, stride, batch_size, show_progress: as for hf_megatron.paper.evaluation.evaluate_wikitext103.
Returns:
    perplexity, loss, tokens, original_tokens, examples, window, stride, seconds.
"""
_CITATION = """\
@article{shoeybi2019megatron,
    title={Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism},
    author={Shoeybi, Mohammad and Patwary, Mostofa and Puri, Raul and LeGresley, Patrick and Casper, Jared and
            Catanzaro, Bryan},
    journal={arXiv:1909.08053},
    year={2019}
}
"""


class Wikitext103(evaluate.Measurement):
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
        return vars(evaluate_wikitext103(model, tokenizer, "".join(data), **options))
