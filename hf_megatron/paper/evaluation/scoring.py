"""What both evaluations ask of a model: the logits where tokens are predicted, and nothing else of the head.

Shapes: B batch, S sequence, K chosen positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

IGNORED = -100
_logger = logging.getLogger(__name__)
_WARM_UP = 1  # batches before the expected time is measured: they allocate and compile
_SAMPLE = 3  # batches that it is measured on


class Example(NamedTuple):
    """Token ids, of which the last ``num_predicted`` are predicted from those before them."""

    token_ids: torch.Tensor  # [S + 1], on the CPU
    num_predicted: int


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, without special tokens, however long it is."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def predictions(
    model: Any, batches: Sequence[Sequence[Example]], *, unit: str, show_progress: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits [B, K, V] and labels [B, K] of each batch of B examples, replicated, on the model's device.

    K is as many positions as any of the examples needs; labels are ``IGNORED`` where one predicts nothing. With
    ``show_progress`` rank 0 shows a bar that counts the examples, called ``unit``, and soon logs the expected time.
    """
    show = show_progress and (not dist.is_initialized() or dist.get_rank() == 0)
    total, done, started = sum(map(len, batches)), 0, time.monotonic()
    with tqdm(total=total, unit=f" {unit}", file=sys.stderr, disable=not show) as bar:
        for index, batch in enumerate(batches):
            if index == _WARM_UP:
                started, done = time.monotonic(), 0
            yield _predict(model, batch)
            done += len(batch)
            bar.update(len(batch))
            if show and index + 1 == min(_WARM_UP + _SAMPLE, len(batches)):
                expected = (time.monotonic() - started) / done * total
                _logger.info("Expected for all %s %s: %.0f seconds.", f"{total:,}", unit, expected)


def _predict(model: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(example.token_ids) for example in batch)
    first = min(len(example.token_ids) - example.num_predicted for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)  # padded at the end, where a causal model does not look
    labels = torch.full((len(batch), longest), IGNORED)
    for row, (token_ids, num_predicted) in enumerate(batch):
        end = len(token_ids)
        ids[row, :end] = token_ids
        labels[row, end - num_predicted : end] = ids[row, end - num_predicted : end]
    logits = logits_at(model, ids[:, :-1], torch.arange(first - 1, longest - 1))
    return logits, labels[:, first:].to(logits.device)


def logits_at(model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The logits [B, K, V] of ``input_ids`` [B, S] at ``positions`` [K]; the head is computed for these alone.

    All are replicated; every rank makes this call. The logits are in float32, or float64 if the model is.
    """
    names, positions = inspect.signature(model.forward).parameters, positions.to(model.device)
    options = {"use_cache": False, "logits_to_keep": positions}
    known = {name: value for name, value in options.items() if name in names}
    logits: torch.Tensor = model(input_ids=input_ids.to(model.device), **known).logits
    logits = logits if "logits_to_keep" in names else logits[:, positions]
    return logits if logits.dtype == torch.float64 else logits.float()
