"""WikiText-103 perplexity by the paper's protocol: overlapping windows, and a loss on the end of each only.

The text, detokenised, is one sequence of tokens, of which the first is never predicted. A window of 1024 advances by
32; the loss is taken of its last 32 predictions (of the first window: of all), so that every token is predicted once,
and all but the first thousand from at least 992 before it. The sum is divided by the number of tokens of the original
file:

    perplexity = exp(-(1 / T_o) * sum over the T predictions of log P)

Source: Shoeybi et al. 2019, arXiv:1909.08053, appendix E.1, equation 4.

Shapes: B windows, S their length, K predictions of each, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import exp
from typing import Any

import torch
import torch.nn.functional as F

from hf_megatron.errors import DataError
from hf_megatron.paper.evaluation.detokenizer import detokenize_wikitext
from hf_megatron.paper.evaluation.scoring import encode, logits_at, with_progress

WINDOW = 1024
STRIDE = 32


@dataclass(frozen=True, kw_only=True)
class Wikitext103Result:
    """What was measured.

    Attributes:
        perplexity: Normalised by the original tokens.
        loss: Mean over the predictions, in nats.
        tokens: T, predictions.
        original_tokens: T_o, pieces of the stripped file between single spaces.
        examples: Windows.
        window: Their length.
        stride: How far they advance.
        seconds: How long it took.
    """

    perplexity: float
    loss: float
    tokens: int
    original_tokens: int
    examples: int
    window: int
    stride: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Window:
    """A window of the text.

    Attributes:
        start: Its first token.
        length: Number of tokens that go in.
        predictions: How many of its last positions count.
    """

    start: int
    length: int
    predictions: int


def windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over a text of ``num_tokens``, which together predict each token but the first one once."""
    first = min(window, num_tokens - 1)
    yield Window(0, first, first)
    for predicted in range(first, num_tokens - 1, stride):
        count = min(stride, num_tokens - 1 - predicted)
        start = predicted + stride - window
        yield Window(start, predicted + count - start, count)


@torch.inference_mode()
def evaluate_wikitext103(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int | None = None,
    stride: int = STRIDE,
    batch_size: int | None = None,
    show_progress: bool = False,
) -> Wikitext103Result:
    """Perplexity of a model on the text of a ``wiki.*.tokens`` file.

    Args:
        model: A causal language model, in evaluation mode. Every rank of one that is cut makes this call.
        tokenizer: Its tokenizer.
        text: Content of the file, tokenised as it is there.
        window: Length of the windows: 1024, or as many as the model has positions if these are fewer.
        stride: How far a window advances; 32 in the paper. Larger ones are quicker, with less context.
        batch_size: Windows at a time; by default 4 on a CPU, whose caches hold no more, and 16 elsewhere.
        show_progress: Show progress on stderr.

    Raises:
        DataError: A text of less than two tokens, or a stride that the window does not have room for.
    """
    started = time.monotonic()
    positions = getattr(model.config, "max_position_embeddings", None) or WINDOW
    window = window or min(WINDOW, positions)
    if not 1 <= stride <= window <= positions:
        raise DataError(
            f"stride={stride}, window={window}: the stride must be 1 or more and no longer than the window, and the "
            f"window no longer than the model's {positions} positions."
        )
    ids = encode(tokenizer, detokenize_wikitext(text))
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; there is nothing to predict.")
    found = list(windows(len(ids), window, stride))
    batch_size = batch_size or (4 if model.device.type == "cpu" else 16)
    negative = _summed_losses(model, torch.tensor(ids), found, batch_size, show_progress)
    num_predictions, num_original = len(ids) - 1, len(text.strip().split(" "))
    return Wikitext103Result(
        perplexity=exp(negative / num_original),
        loss=negative / num_predictions,
        tokens=num_predictions,
        original_tokens=num_original,
        examples=len(found),
        window=window,
        stride=stride,
        seconds=time.monotonic() - started,
    )


def _summed_losses(model: Any, ids: torch.Tensor, found: Sequence[Window], batch_size: int, show: bool) -> float:
    """Minus the sum of the log-probabilities of all predictions, in nats."""
    batches = list(_batches(found, batch_size))
    total = torch.zeros((), dtype=torch.float64)
    for batch in with_progress(batches, [len(batch) for batch in batches], unit="windows", show=show):
        length, count = batch[0].length, batch[0].predictions
        inputs = torch.stack([ids[window.start : window.start + length] for window in batch])  # [B, S]
        targets = torch.stack([ids[window.start + 1 : window.start + 1 + length] for window in batch])[:, -count:]
        logits = logits_at(model, inputs, torch.arange(length - count, length))  # [B, K, V]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(logits.device), reduction="none")
        total += losses.double().sum().cpu()
    return float(total)


def _batches(found: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Windows of one shape at a time: only the first and the last one differ from the others."""
    for _, group in groupby(found, key=lambda window: (window.length, window.predictions)):
        alike = list(group)
        for first in range(0, len(alike), batch_size):
            yield alike[first : first + batch_size]
