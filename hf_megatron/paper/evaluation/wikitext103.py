"""WikiText-103 perplexity by the paper's protocol: overlapping windows, and a loss on the end of each only.

The text, detokenised, is one sequence of tokens. A window of 1024 advances by 32; the loss is taken of its last 32
predictions (of the first window: of all), so that every token but the first is predicted once, and all but the first
thousand from at least 992 before it. The sum is divided by T_o, the number of tokens of the original file:

    perplexity = exp(-(1 / T_o) * sum over the T predictions of log P)

Source: Shoeybi et al. 2019, arXiv:1909.08053, appendix E.1, equation 4. The detokenizer is that of the paper's code
(Megatron-LM, tasks/zeroshot_gpt2): 270,330 GPT-2 tokens for the test set.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import exp
from typing import Any

import torch
import torch.nn.functional as F

from hf_megatron.errors import DataError
from hf_megatron.paper.evaluation.scoring import Example, encode, predictions

WINDOW = 1024
STRIDE = 32

# The rules of the detokenizer, whose order decides what comes out.
_BEFORE_PAIRS = (
    ("s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
# What stands between the two marks loses the spaces at its ends; nothing is nested.
_PAIRS = tuple(
    (re.compile(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"), rf"{left}\1{right}")
    for left, right in ("()", "[]", "{}", '""', "''")
)
_AFTER_PAIRS = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize_wikitext(text: str) -> str:
    """A ``wiki.*.tokens`` file as people write: no spaces around punctuation, no ``@`` in numbers and compounds.

    A model trained on ordinary text would be measured on its surprise at ``1 @,@ 000``.
    """
    for old, new in _BEFORE_PAIRS:
        text = text.replace(old, new)
    for pair, tight in _PAIRS:
        text = pair.sub(tight, text)
    for old, new in _AFTER_PAIRS:
        text = text.replace(old, new)
    return text


@dataclass(frozen=True, kw_only=True)
class Wikitext103Result:
    """What was measured."""

    perplexity: float  # normalised by the original tokens
    loss: float  # mean over the predictions, in nats
    tokens: int  # T, predictions
    original_tokens: int  # T_o, pieces of the stripped file between single spaces
    examples: int  # windows
    window: int  # tokens of a window
    stride: int  # tokens from one window to the next
    seconds: float


@dataclass(frozen=True, slots=True)
class Window:
    """``length`` tokens from ``start`` on go in, and the last ``predictions`` of their positions count."""

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
        model: A causal language model, in evaluation mode. If it is cut over ranks, every rank makes this call.
        tokenizer: Its tokenizer.
        text: Content of the file, tokenised as it is there; DataError for less than two tokens.
        window: Length of the windows: 1024, or as many as the model has positions if these are fewer.
        stride: How far a window advances; 32 in the paper. Larger ones are quicker, with less context; DataError for
            one longer than the window.
        batch_size: Windows at a time; by default 4 on a CPU, whose caches hold no more, and 16 elsewhere.
        show_progress: Show progress on stderr.
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
    tokens = torch.tensor(ids)
    examples = [
        Example(tokens[part.start : part.start + part.length + 1], part.predictions)
        for part in windows(len(ids), window, stride)
    ]
    batches = list(_batches(examples, batch_size or (4 if model.device.type == "cpu" else 16)))
    total = torch.zeros((), dtype=torch.float64)  # minus the sum of the log-probabilities, in nats
    for logits, labels in predictions(model, batches, unit="windows", show_progress=show_progress):
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        total += losses.double().sum().cpu()
    num_predictions, num_original = len(ids) - 1, len(text.strip().split(" "))
    return Wikitext103Result(
        perplexity=exp(float(total) / num_original),
        loss=float(total) / num_predictions,
        tokens=num_predictions,
        original_tokens=num_original,
        examples=len(examples),
        window=window,
        stride=stride,
        seconds=time.monotonic() - started,
    )


def _batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """Examples of one shape at a time: only the first and the last window differ from the others."""
    for _, group in groupby(examples, key=lambda example: (len(example.token_ids), example.num_predicted)):
        alike = list(group)
        for first in range(0, len(alike), batch_size):
            yield alike[first : first + batch_size]
