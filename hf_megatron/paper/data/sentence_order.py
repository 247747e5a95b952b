"""Documents to pairs of segments, of which BERT tells whether they stand in their order.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 4.2, which takes sentence-order prediction, in place of BERT's
next sentence, from Lan et al. 2019, arXiv:1909.11942.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_megatron.errors import DataError
from hf_megatron.paper.data.tokens import SegmentPairs, tokenize_distinct

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


def tokenize_sentences(tokenizer: PreTrainedTokenizerBase, text: str) -> list[list[int]]:
    """The token ids of each sentence of a text, without special tokens.

    A sentence ends at an empty line, and at a full stop, question or exclamation mark before white space. That suits
    prose in European languages; split other text yourself.
    """
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]
    tokens = tokenize_distinct(tokenizer, sentences)
    return [tokens[sentence].ids for sentence in sentences]


def sentence_order_pairs(
    documents: Iterable[Sequence[Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    short_probability: float = 0.1,
    generator: torch.Generator | None = None,
) -> Iterator[dict[str, Any]]:
    """Cut documents into pairs of consecutive segments, and swap half of the pairs.

    Sentences are gathered until they fill a sequence, and split in two at a random sentence. The longer segment is cut
    at its end to fit. A single sentence left at a document's end is dropped. Every call draws other cuts and orders.

    Args:
        documents: Lists of sentences, each a list of token ids, as :func:`tokenize_sentences` gives them.
        tokenizer: A tokenizer with ``[CLS]`` and ``[SEP]``; DataError if it lacks one.
        max_length: Longest sequence, in tokens, special ones included; DataError if it holds only these.
        short_probability: Share of the sequences that aim at a random shorter length.
        generator: What to draw from; torch's default generator if None. Ranks of a tensor-parallel group must draw the
            same numbers.

    Yields:
        Lists ``input_ids`` and ``token_type_ids``, and ``sentence_order_label``: 0 if the segments stand in their
        order, 1 if swapped. :class:`DataCollatorForMegatronBertPretraining` takes these.
    """
    pairs, room = SegmentPairs(tokenizer), max_length - SegmentPairs.num_special
    if room < 2:
        raise DataError(
            f"max_length={max_length} does not hold a pair; choose at least {SegmentPairs.num_special + 2}: "
            f"{SegmentPairs.num_special} special tokens and one for each segment."
        )
    for document in documents:
        for sentences in _fill(document, room, short_probability, generator):
            split = _randint(1, len(sentences), generator)
            first, second = list(chain(*sentences[:split])), list(chain(*sentences[split:]))
            if label := _randint(0, 2, generator):
                first, second = second, first
            # Cut the longer one, then both alike, after swapping and at the end: neither lengths nor cuts may tell.
            keep = min(len(first), max(room - len(second), room - room // 2))
            yield {**pairs.join(first[:keep], second[: room - keep]), "sentence_order_label": label}


def _fill(
    document: Sequence[Sequence[int]], room: int, short_probability: float, generator: torch.Generator | None
) -> Iterator[list[Sequence[int]]]:
    """Runs of at least two sentences that hold about ``room`` tokens, sometimes fewer."""

    def draw_target() -> int:
        is_short = torch.rand((), generator=generator).item() < short_probability
        return _randint(2, room + 1, generator) if is_short else room

    sentences: list[Sequence[int]] = []
    target = draw_target()
    for sentence in filter(len, document):
        sentences.append(sentence)
        if len(sentences) > 1 and sum(map(len, sentences)) >= target:
            yield sentences
            sentences, target = [], draw_target()
    if len(sentences) > 1:
        yield sentences


def _randint(low: int, high: int, generator: torch.Generator | None) -> int:
    """Uniform in ``low`` to ``high - 1``."""
    return int(torch.randint(low, high, (), generator=generator))
