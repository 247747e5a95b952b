"""Documents to pairs of segments, of which the model tells whether they stand in their order.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 4.2, which takes sentence-order prediction, in place of BERT's
next sentence, from Lan et al. 2019, arXiv:1909.11942.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_megatron.errors import DataError
from hf_megatron.paper.data.special_tokens import special_token_id

_NUM_SPECIAL = 3  # [CLS] first [SEP] second [SEP]
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


def tokenize_sentences(tokenizer: PreTrainedTokenizerBase, text: str) -> list[list[int]]:
    """The token ids of each sentence of a text, without special tokens.

    A sentence ends at a full stop, question or exclamation mark before white space, and at an empty line. That suits
    prose in European languages; split others yourself.
    """
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]
    if not sentences:
        return []
    # A whole document is no input for a model: verbose=False leaves out the warning about its length.
    token_ids: list[list[int]] = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]
    return token_ids


def sentence_order_pairs(
    documents: Iterable[Sequence[Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    short_probability: float = 0.1,
    generator: torch.Generator | None = None,
) -> Iterator[dict[str, Any]]:
    """Cut documents into pairs of consecutive segments, and swap half of the pairs.

    A document's sentences are gathered until they fill a sequence, and split in two at a random sentence. What is too
    long is cut off at the end of the longer segment. A pair needs two sentences: a document of one gives none, and a
    single sentence left over at a document's end is dropped. For other cuts and orders in the next epoch, call again.

    Args:
        documents: Each a list of sentences, each a list of token ids without special tokens, as
            :func:`tokenize_sentences` gives them.
        tokenizer: A tokenizer with ``[CLS]`` and ``[SEP]``.
        max_length: Longest sequence, in tokens, special ones included.
        short_probability: Share of the sequences that aim at a random shorter length, so that the model sees such too.
        generator: What to draw from; torch's default generator if None. Ranks of a tensor-parallel group must draw the
            same numbers.

    Yields:
        ``input_ids`` and ``token_type_ids``, lists of the same length, and ``sentence_order_label``: 0 if the segments
        stand in their order, 1 if they are swapped. These are what :class:`DataCollatorForMegatronBertPretraining`
        takes, and what ``datasets.Dataset.from_list`` makes columns of.

    Raises:
        DataError: ``max_length`` does not hold two tokens and the special ones, or the tokenizer lacks one of these.
    """
    room = max_length - _NUM_SPECIAL
    if room < 2:
        raise DataError(
            f"max_length={max_length} does not hold a pair; choose at least {_NUM_SPECIAL + 2}: "
            f"{_NUM_SPECIAL} special tokens and one for each segment."
        )
    cls, sep = special_token_id(tokenizer, "cls"), special_token_id(tokenizer, "sep")
    for document in documents:
        for sentences in _fill(document, room, short_probability, generator):
            split = _randint(1, len(sentences), generator)
            first, second = _join(sentences[:split]), _join(sentences[split:])
            label = _randint(0, 2, generator)
            if label:
                first, second = second, first
            first, second = _shorten(first, second, room)  # swapped already: no length may tell the label
            yield {
                "input_ids": [cls, *first, sep, *second, sep],
                "token_type_ids": [0] * (len(first) + 2) + [1] * (len(second) + 1),
                "sentence_order_label": label,
            }


def _fill(
    document: Sequence[Sequence[int]], room: int, short_probability: float, generator: torch.Generator | None
) -> Iterator[list[Sequence[int]]]:
    """Runs of at least two sentences that hold about ``room`` tokens, sometimes fewer."""
    sentences: list[Sequence[int]] = []
    target = _target(room, short_probability, generator)
    for sentence in filter(len, document):
        sentences.append(sentence)
        if len(sentences) > 1 and sum(map(len, sentences)) >= target:
            yield sentences
            sentences = []
            target = _target(room, short_probability, generator)
    if len(sentences) > 1:
        yield sentences


def _target(room: int, short_probability: float, generator: torch.Generator | None) -> int:
    is_short = torch.rand((), generator=generator).item() < short_probability
    return _randint(2, room + 1, generator) if is_short else room


def _shorten(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Cut the longer segment, then both alike, until they fit."""
    # Of either the end: if one were cut at its start and the other at its end, that would tell the label too.
    keep = min(len(first), max(room - len(second), room - room // 2))
    return first[:keep], second[: room - keep]


def _join(sentences: Iterable[Sequence[int]]) -> list[int]:
    return [token for sentence in sentences for token in sentence]


def _randint(low: int, high: int, generator: torch.Generator | None) -> int:
    """Uniform in ``low`` to ``high - 1``."""
    return int(torch.randint(low, high, (), generator=generator))
