"""Sentence-order pairs: what is cut from documents, and how."""

from collections import Counter
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from transformers import BertTokenizerFast, GPT2TokenizerFast, PreTrainedTokenizerBase

from hf_megatron.errors import DataError
from hf_megatron.paper.data import sentence_order_pairs, tokenize_sentences
from tests.data.conftest import Document


def _numbered(*lengths: int) -> Document:
    """A document with sentences of these lengths, whose tokens count from 100 on, so that each tells its place."""
    ends = list(accumulate(lengths, initial=100))
    return [list(range(start, end)) for start, end in pairwise(ends)]


def _pairs(*documents: Document, **kwargs: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return list(sentence_order_pairs(documents, BertTokenizerFast(), **{"max_length": 32, **kwargs}))


def _segments(pair: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The two segments of a pair in the order of the text; checks everything around them."""
    tokenizer = BertTokenizerFast()
    ids, types = pair["input_ids"], pair["token_type_ids"]
    middle = types.index(1)
    assert types == [0] * middle + [1] * (len(ids) - middle)
    first, second = ids[1 : middle - 1], ids[middle:-1]
    assert ids == [tokenizer.cls_token_id, *first, tokenizer.sep_token_id, *second, tokenizer.sep_token_id]
    return (second, first) if pair["sentence_order_label"] else (first, second)


def test_segments_are_consecutive_sentences() -> None:
    """Catches labels the wrong way round, segments with holes or from elsewhere, and cuts inside a sentence."""
    document = _numbered(*[3, 7, 5, 4, 6, 2, 8] * 40)
    starts = {sentence[0] for sentence in document}
    pairs = _pairs(document)
    for pair in pairs:
        first, second = _segments(pair)
        assert first == list(range(first[0], first[0] + len(first)))
        assert second == list(range(second[0], second[0] + len(second)))
        # What is too long is cut at the end of a segment, in order or not: a cut start would give the order away.
        assert first[0] in starts
        assert second[0] in starts
        if len(pair["input_ids"]) < 32:
            assert second[0] == first[-1] + 1
        else:
            assert second[0] > first[-1]
    assert {pair["sentence_order_label"] for pair in pairs} == {0, 1}


def test_half_of_the_pairs_are_swapped() -> None:
    """Catches a label that is not a fair coin's."""
    pairs = _pairs(_numbered(*[10] * 6000))
    labels = Counter(pair["sentence_order_label"] for pair in pairs)
    # About 2000 pairs: two standard deviations are 0.022.
    assert labels.total() > 1900
    assert labels[1] / labels.total() == pytest.approx(0.5, abs=0.035)


def test_lengths_do_not_tell_the_label() -> None:
    """Catches segments cut before they are swapped, of which the one that comes first in the text is the longer."""
    lengths: dict[int, set[int]] = {0: set(), 1: set()}
    for pair in _pairs(_numbered(*[40] * 100)):
        lengths[pair["sentence_order_label"]].add(pair["token_type_ids"].index(1))
    assert lengths[0] == lengths[1]


def test_every_split_occurs() -> None:
    """Catches a split that is always in the middle, or never at the first or last sentence."""
    document = _numbered(5, 5, 5, 5)
    firsts = Counter(len(_segments(pair)[0]) for pair in _pairs(*[document] * 300, short_probability=0.0))
    assert set(firsts) == {5, 10, 15}
    assert min(firsts.values()) > 70


def test_sequences_are_filled() -> None:
    """Catches sequences that are too long, or shorter than they need to be."""
    pairs = _pairs(_numbered(*[4, 9, 6, 1] * 200), short_probability=0.0)
    assert {len(pair["input_ids"]) for pair in pairs[:-1]} == {32}


def test_no_text_is_lost_between_pairs() -> None:
    """Catches sentences skipped where one pair ends and the next begins."""
    document = _numbered(*[9] * 30)  # three sentences fill 27 of 29 places, the fourth is cut
    starts = sorted(min(_segments(pair))[0] for pair in _pairs(document, short_probability=0.0))
    assert starts == [100 + 36 * i for i in range(8)]
    assert _segments(_pairs(document, max_length=1000, short_probability=0.0)[0])[1][-1] == document[-1][-1]


def test_some_sequences_are_short() -> None:
    """Catches ``short_probability`` without effect, or with one on most sequences."""
    pairs = _pairs(_numbered(*[2] * 8000), max_length=64)
    lengths = [len(pair["input_ids"]) for pair in pairs]
    share = sum(length < 60 for length in lengths) / len(lengths)
    assert 0.05 < share < 0.15
    assert min(lengths) < 20


@pytest.mark.parametrize("document", [[], [[]], _numbered(5), _numbered(500)])
def test_documents_without_a_pair(document: Document) -> None:
    """Catches pairs without a second sentence."""
    assert _pairs(document) == []


@pytest.mark.parametrize("doc", [[[], [100], [], [101]], _numbered(1, 1), _numbered(2, 500), _numbered(*[500] * 3)])
def test_documents_of_one_pair(doc: Document) -> None:
    """Catches empty segments, and sequences over the limit."""
    (pair,) = _pairs(doc)
    assert all(_segments(pair))
    assert len(pair["input_ids"]) <= 32


def test_the_longer_segment_is_cut() -> None:
    """Catches a short sentence cut off to make room for a long one."""
    assert list(map(len, _segments(_pairs(_numbered(3, 500))[0]))) == [3, 26]
    assert list(map(len, _segments(_pairs(_numbered(500, 3))[0]))) == [26, 3]
    assert sorted(map(len, _segments(_pairs(_numbered(500, 400))[0]))) == [14, 15]
    assert _segments(_pairs(_numbered(9, 9), max_length=5)[0]) == ([100], [109])


def test_what_holds_no_pair_is_refused() -> None:
    """Catches a negative room that slicing would silently take from the other end, and None among the token ids."""
    with pytest.raises(DataError, match="max_length=4 does not hold a pair; choose at least 5"):
        _pairs(_numbered(9, 9), max_length=4)
    with pytest.raises(DataError, match="has no cls token"):
        list(sentence_order_pairs([_numbered(9, 9)], GPT2TokenizerFast(), max_length=32))


def test_random_stream_given_or_default() -> None:
    """Catches numbers that come from elsewhere than the generator, which would differ between ranks."""
    document = _numbered(*[5] * 200)
    generator = torch.Generator().manual_seed(0)
    by_default, given, again = (_pairs(document, generator=chosen) for chosen in (None, generator, generator))
    assert given == by_default
    assert again != given


def test_sentences_of_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches lost or empty sentences, and special tokens inside a document."""
    text = "The first one. Is it\nthe second? No! A heading\n\nAnd version 3.12 of it.\n \n"
    sentences = ["The first one.", "Is it\nthe second?", "No!", "A heading", "And version 3.12 of it."]
    expected = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences]
    assert tokenize_sentences(tokenizer, text) == expected
    assert tokenize_sentences(tokenizer, " \n\n ") == []
