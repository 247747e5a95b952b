"""What the evaluations ask of a model: logits at chosen positions, and nothing else of the head.

Shapes: B batch, S sequence, K chosen positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_WARM_UP = 1  # batches that the expected time is not taken from: they allocate and compile
_SAMPLE = 3  # batches that it is taken from


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, without special tokens, however long it is."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def logits_at(model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The logits of some positions; the head is computed for these alone.

    Args:
        model: A causal language model; of one that is cut over ranks, every rank makes this call.
        input_ids: [B, S], on the CPU, replicated.
        positions: [K], the same of every sequence.

    Returns:
        [B, K, V] in float32 (float64 stays float64), replicated.
    """
    names = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    positions = positions.to(model.device)
    keeps = "logits_to_keep" in names
    if keeps:
        arguments["logits_to_keep"] = positions
    logits: torch.Tensor = model(input_ids=input_ids.to(model.device), **arguments).logits
    logits = logits if keeps else logits[:, positions]
    return logits if logits.dtype == torch.float64 else logits.float()


def with_progress(batches: Sequence[_T], sizes: Sequence[int], *, unit: str, show: bool) -> Iterator[_T]:
    """Go through batches with a bar on stderr that shows the remaining time, on rank 0 alone.

    After a few batches the time that is expected for all of them is logged.

    Args:
        batches: What to go through.
        sizes: How much work each is, in ``unit``.
        unit: Of the work.
        show: Whether to show anything.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    total, done, started = sum(sizes), 0, time.monotonic()
    with tqdm(total=total, unit=f" {unit}", file=sys.stderr, disable=not (show and is_first)) as bar:
        for index, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            if index == _WARM_UP:
                started, done = time.monotonic(), 0
            yield batch
            done += size
            bar.update(size)
            if show and is_first and index + 1 == min(_WARM_UP + _SAMPLE, len(batches)):
                expected = (time.monotonic() - started) / done * total
                _logger.info("Expected for all %s %s: %.0f seconds.", f"{total:,}", unit, expected)
