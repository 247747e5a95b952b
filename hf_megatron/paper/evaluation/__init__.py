"""The paper's zero-shot evaluations: WikiText-103 perplexity and LAMBADA accuracy, of any causal language model.

    result = evaluate_wikitext103(model, tokenizer, Path("wiki.test.tokens").read_text(encoding="utf-8"))
    result = evaluate_lambada(model, tokenizer, read_passages(Path("lambada_test.jsonl")))

If the model is cut over several ranks, every rank makes the call. Both are ``evaluate`` modules as well, which need no
network:

    evaluate.load(module_path("lambada")).compute(data=passages, model=model, tokenizer=tokenizer)

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 5.2 and appendix E.
"""

from __future__ import annotations

from pathlib import Path

from hf_megatron.errors import DataError
from hf_megatron.paper.evaluation.lambada import LambadaResult, Passage, evaluate_lambada, read_passages
from hf_megatron.paper.evaluation.wikitext103 import Wikitext103Result, detokenize_wikitext, evaluate_wikitext103

__all__ = [
    "MODULES",
    "LambadaResult",
    "Passage",
    "Wikitext103Result",
    "detokenize_wikitext",
    "evaluate_lambada",
    "evaluate_wikitext103",
    "module_path",
    "read_passages",
]

MODULES = ("lambada", "wikitext103")


def module_path(name: str) -> str:
    """The path of one of ``MODULES``, for ``evaluate.load``; DataError if it is none."""
    if name not in MODULES:
        raise DataError(f"there is no evaluation {name!r} in this package; choose one of {', '.join(MODULES)}.")
    return str(Path(__file__).with_name(f"{name}_measurement.py"))
