"""What is aimed at: ratios of ours to a peer, on the same work in the same run; smaller is better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.peers.derived import CARD, Result, ratio_of
from benchmarks.peers.rounds import Spread

__all__ = ["TARGETS", "Target", "reached"]


@dataclass(frozen=True)
class Target:
    """One aim.

    Args:
        work: What is compared, in words.
        workload: The workload it is measured with.
        ours: Configuration of the numerator.
        peer: That of the denominator.
        at_most: The ratio aimed at.
        figure: As for :func:`ratio_of`.
    """

    work: str
    workload: str
    ours: str
    peer: str
    at_most: float
    figure: str = "step"


_TP2, _TWO_THREADS = "ours-tp2-1t", "ours-tp1-2t"
_MEGATRON, _DTENSOR, _TRANSFORMERS = "megatron-core-tp2-1t", "dtensor-tp2-1t", "transformers-tp-tp2-1t"
_SDPA, _EAGER = "stock-sdpa-tp1-2t", "stock-eager-tp1-2t"
_CARD_OURS, _CARD_STOCK = "ours-compiled-tp1-1t", "stock-compiled-tp1-1t"

TARGETS = (
    Target("GPT-2 bf16 TP=2 to megatron-core", "gpt2-bf16", _TP2, _MEGATRON, 0.92),
    Target("GPT-2 fp32 TP=2 to megatron-core", "gpt2-fp32", _TP2, _MEGATRON, 1.00),
    Target("GPT-2 fp32 TP=2 to DTensor with loss_parallel", "gpt2-fp32", _TP2, _DTENSOR, 0.60),
    Target("GPT-2 bf16 TP=2 to DTensor with loss_parallel", "gpt2-bf16", _TP2, _DTENSOR, 0.60),
    Target("BERT fp32 TP=2 to megatron-core", "bert-fp32", _TP2, _MEGATRON, 0.75),
    Target("BERT bf16 TP=2 to megatron-core", "bert-bf16", _TP2, _MEGATRON, 0.75),
    Target("BERT fp32 TP=2 to transformers' TP", "bert-fp32", _TP2, _TRANSFORMERS, 0.65),
    Target("BERT bf16 TP=2 to transformers' TP", "bert-bf16", _TP2, _TRANSFORMERS, 0.65),
    Target("GPT-2 fp32 TP=2 to our TP=1 with 2 threads", "gpt2-fp32", _TP2, _TWO_THREADS, 1.00),
    Target("GPT-2 bf16 TP=2 to our TP=1 with 2 threads", "gpt2-bf16", _TP2, _TWO_THREADS, 1.00),
    Target("BERT fp32 TP=2 to our TP=1 with 2 threads", "bert-fp32", _TP2, _TWO_THREADS, 1.00),
    Target("GPT-2 fp32 TP=1 to stock, 2 threads", "gpt2-fp32", _TWO_THREADS, _SDPA, 0.90),
    Target("GPT-2 bf16 TP=1 to stock, 2 threads", "gpt2-bf16", _TWO_THREADS, _SDPA, 0.90),
    Target("BERT fp32 TP=1 to stock, 2 threads", "bert-fp32", _TWO_THREADS, _EAGER, 0.90),
    Target("GPT-2 fp32 TP=2, peak memory, to megatron-core", "gpt2-fp32", _TP2, _MEGATRON, 0.65, "resident"),
    Target("GPT-2 355M on a GPU to stock compiled", "gpt2-355m", _CARD_OURS, _CARD_STOCK, 0.80),
    Target("GPT-2 1.2B on a GPU to stock compiled", "gpt2-1.2b", _CARD_OURS, _CARD_STOCK, 0.80),
    Target("GPT-2 2.5B on a GPU to stock compiled", "gpt2-2.5b", _CARD_OURS, _CARD_STOCK, 0.80),
    Target("GPT-2 1.2B on a GPU to its peak (2.00 is an MFU of 50%)", "gpt2-1.2b", _CARD_OURS, CARD, 2.00),
)


def reached(results: Mapping[str, Result]) -> Iterator[tuple[Target, Spread, bool]]:
    """Every target of which both sides were measured, its ratio, and whether the median meets it."""
    for target in TARGETS:
        if target.workload in results:
            ratio = ratio_of(results[target.workload], target.ours, target.peer, target.figure)
            if ratio is not None:
                yield target, ratio, ratio.median <= target.at_most
