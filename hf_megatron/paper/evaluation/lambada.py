"""LAMBADA accuracy by the paper's protocol: the last word of a passage, right only if all of its sub-words are.

Each sub-word has to be the likeliest one given the passage and the right sub-words before it (teacher forcing).

Source: Paperno et al. 2016, arXiv:1606.06031; Shoeybi et al. 2019, arXiv:1909.08053, appendix E.2.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_megatron.errors import DataError
from hf_megatron.paper.evaluation.scoring import IGNORED, Example, encode, predictions

_LAST_WORD = re.compile(r"\s\S+\s*\Z")


@dataclass(frozen=True, kw_only=True)
class LambadaResult:
    """What was measured."""

    accuracy: float  # share of the passages whose last word is right, in [0, 1]
    perplexity: float  # exp of minus the mean log-probability of the last words
    tokens: int  # sub-words of all last words
    examples: int  # passages
    seconds: float


@dataclass(frozen=True, slots=True)
class Passage:
    """A text in two parts: what comes before the last word, and the last word with the space before it."""

    context: str
    target: str

    @classmethod
    def split(cls, text: str) -> Passage:
        """Split a text at its last word; DataError if it has less than two."""
        found = _LAST_WORD.search(text)
        if found is None or not text[: found.start()].strip():
            raise DataError(f"the passage {text!r} has less than two words; the last one is predicted from the others.")
        return cls(text[: found.start()], text[found.start() :])


def read_passages(file: Path) -> list[str]:
    """The passages of a file: JSON objects with a ``text``, one a line (``.jsonl``), or a passage a line.

    Both the raw edition, tokenised and in lower case, and the detokenised one come in either form. DataError if a line
    is not what it should be, or there is none.
    """
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{file} has no passages.")
    if file.suffix != ".jsonl":
        return lines
    passages = []
    for number, line in enumerate(lines, start=1):
        try:
            passages.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"line {number} of {file} is no JSON object with a text: {error!r}.") from error
    return passages


@torch.inference_mode()
def evaluate_lambada(
    model: Any, tokenizer: Any, passages: Sequence[str], *, batch_size: int = 16, show_progress: bool = False
) -> LambadaResult:
    """Accuracy of a causal language model, in evaluation mode, on the last words of passages, which these include.

    If it is cut over ranks, every rank makes this call. ``batch_size`` is the number of passages at a time, of about
    the same length. Progress is shown on stderr. DataError if there are no passages, or one has less than two words or
    is longer than the model has positions.
    """
    started = time.monotonic()
    if not passages:
        raise DataError("there are no passages; give at least one.")
    examples = sorted((_example(tokenizer, text) for text in passages), key=lambda example: len(example.token_ids))
    longest, positions = len(examples[-1].token_ids), getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise DataError(f"a passage has {longest} tokens, more than the model's {positions} positions.")
    batches = [examples[first : first + batch_size] for first in range(0, len(examples), batch_size)]
    num_right, loss = 0, 0.0
    for logits, labels in predictions(model, batches, unit="passages", show_progress=show_progress):
        is_right = (logits.argmax(-1) == labels) | (labels == IGNORED)  # [B, K]
        num_right += int(is_right.all(-1).sum())
        loss += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").double().sum())
    return LambadaResult(
        accuracy=num_right / len(examples),
        perplexity=exp(loss / len(examples)),
        tokens=sum(example.num_predicted for example in examples),
        examples=len(examples),
        seconds=time.monotonic() - started,
    )


def _example(tokenizer: Any, text: str) -> Example:
    """A passage whose last word, which follows after one space, is predicted."""
    passage = Passage.split(text)
    target = encode(tokenizer, f" {passage.target.strip()}")
    return Example(torch.tensor(encode(tokenizer, passage.context.rstrip()) + target), len(target))
