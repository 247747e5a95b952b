"""LAMBADA accuracy by the paper's protocol: the last word of a passage, right only if all of its sub-words are.

The passage without its last word goes in, and so does the word itself (teacher forcing): each of its sub-words has to
be the likeliest given the passage and the sub-words before it.

Source: Paperno et al. 2016, arXiv:1606.06031; Shoeybi et al. 2019, arXiv:1909.08053, appendix E.2.

Shapes: B passages, S tokens of the longest, K positions, V vocabulary.
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

from hf_megatron.errors import DataError
from hf_megatron.paper.evaluation.scoring import encode, logits_at, with_progress

_LAST_WORD = re.compile(r"\s\S+\s*\Z")


@dataclass(frozen=True, kw_only=True)
class LambadaResult:
    """What was measured.

    Attributes:
        accuracy: Share of the passages whose last word is right, in [0, 1].
        perplexity: ``exp`` of minus the mean log-probability of the last words.
        tokens: Sub-words of all last words.
        examples: Passages.
        seconds: How long it took.
    """

    accuracy: float
    perplexity: float
    tokens: int
    examples: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage in two parts, which together are the text.

    Attributes:
        context: What comes before the last word.
        target: The last word, with the space before it.
    """

    context: str
    target: str

    @classmethod
    def split(cls, text: str) -> Passage:
        """A text at its last word.

        Raises:
            DataError: The text has less than two words.
        """
        found = _LAST_WORD.search(text)
        if found is None or not text[: found.start()].strip():
            raise DataError(f"the passage {text!r} has less than two words; the last one is predicted from the others.")
        return cls(text[: found.start()], text[found.start() :])


def read_passages(file: Path) -> list[str]:
    """The passages of a file: JSON objects with a ``text``, one a line (``.jsonl``), or a passage a line.

    Both editions are of either form: the raw one, tokenised and in lower case, and the detokenised one.

    Raises:
        DataError: A line is not what it should be, or there is none.
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
    """Accuracy of a model on the last words of passages.

    Args:
        model: A causal language model, in evaluation mode. Every rank of one that is cut makes this call.
        tokenizer: Its tokenizer.
        passages: Whole texts, last word included.
        batch_size: Passages at a time, of about the same length.
        show_progress: Show progress on stderr.

    Raises:
        DataError: There are no passages, one has less than two words, or is longer than the model has positions.
    """
    started = time.monotonic()
    if not passages:
        raise DataError("there are no passages; give at least one.")
    examples = sorted((_encoded(tokenizer, text) for text in passages), key=lambda example: len(example[0]))
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and len(examples[-1][0]) > positions:
        raise DataError(f"a passage has {len(examples[-1][0])} tokens, more than the model's {positions} positions.")
    batches = [examples[first : first + batch_size] for first in range(0, len(examples), batch_size)]
    num_right, log_probability = 0, 0.0
    for batch in with_progress(batches, [len(batch) for batch in batches], unit="passages", show=show_progress):
        right, logs = _scores(model, batch)
        num_right, log_probability = num_right + right, log_probability + logs
    return LambadaResult(
        accuracy=num_right / len(examples),
        perplexity=exp(-log_probability / len(examples)),
        tokens=sum(count for _, count in examples),
        examples=len(examples),
        seconds=time.monotonic() - started,
    )


def _encoded(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """All token ids of a passage, and how many of them are the last word's, which follows after one space."""
    passage = Passage.split(text)
    target = encode(tokenizer, f" {passage.target.strip()}")
    return encode(tokenizer, passage.context.rstrip()) + target, len(target)


def _scores(model: Any, batch: Sequence[tuple[list[int], int]]) -> tuple[int, float]:
    """How many last words of a batch are right, and the sum of the log-probabilities of all of them.

    Padding follows the passages, where a causal model does not see it.
    """
    longest = max(len(ids) for ids, _ in batch)
    inputs = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])[:, :-1]  # [B, S]
    # The batch is sorted: a few positions hold the last words of all.
    first = min(len(ids) - count for ids, count in batch) - 1
    logits = logits_at(model, inputs, torch.arange(first, longest - 1)).cpu()  # [B, K, V]
    num_right, log_probability = 0, 0.0
    for row, (ids, count) in zip(logits, batch, strict=True):
        last = len(ids) - 1 - first
        own, target = row[last - count : last], torch.tensor(ids[-count:])
        num_right += int(bool((own.argmax(-1) == target).all()))
        log_probability += float(own.log_softmax(-1).gather(1, target[:, None]).double().sum())
    return num_right, log_probability
