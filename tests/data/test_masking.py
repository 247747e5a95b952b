"""Whole-word n-gram masking: what is chosen, and what stands in its place."""

from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, GPT2TokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_megatron.errors import DataError
from hf_megatron.paper.data import NgramMasking
from tests.data.conftest import Document


@pytest.fixture(scope="module")
def sequences(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> list[list[int]]:
    """Pairs of real sentences with their special tokens, from 5 tokens to over 200."""
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    pairs = [pair for document in documents for pair in zip(document[::2], document[1::2], strict=False)]
    return [[cls, *first, sep, *second, sep] for first, second in pairs]


def _the(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a word of one token."""
    (token_id,) = tokenizer("the", add_special_tokens=False)["input_ids"]
    return int(token_id)


def test_words_are_the_tokenizers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches words torn apart or glued together."""
    encoding = tokenizer("An unforgettable expression: don't you \u4f60 say (1.5e-3) self.assertEqual?")
    words = NgramMasking(tokenizer).words(encoding["input_ids"])
    # What the tokenizer itself says about which tokens are of one word.
    expected: dict[int, range] = {}
    for position, (word, token) in enumerate(zip(encoding.word_ids(), encoding["input_ids"], strict=True)):
        if word is not None and token not in tokenizer.all_special_ids:
            expected[word] = range(expected[word].start if word in expected else position, position + 1)
    assert words == list(expected.values())
    assert max(map(len, words)) > 2


def test_another_continuation_prefix() -> None:
    """Catches a hard-coded ``##``."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[MASK]", "un", "@@do", "##do", "@@ne"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix="@@"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )
    token_ids = tokenizer("undone un")["input_ids"]
    assert NgramMasking(tokenizer).words([*token_ids, vocabulary["##do"]]) == [range(3), range(3, 4), range(4, 5)]


def test_a_cut_word_starts_after_a_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches the rest of a cut word counted to the sentence before, or an unknown word asked for."""
    continuation = next(i for token, i in tokenizer.get_vocab().items() if token.startswith("##"))
    word = _the(tokenizer)
    token_ids = [tokenizer.cls_token_id, continuation, word, tokenizer.unk_token_id, continuation, continuation]
    assert NgramMasking(tokenizer).words(token_ids) == [range(1, 2), range(2, 3), range(4, 6)]


@pytest.mark.parametrize(("max_ngram", "probability"), [(1, 0.15), (3, 0.15), (3, 0.4)])
def test_whole_words_in_runs(
    tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]], max_ngram: int, probability: float
) -> None:
    """Catches parts of words, runs with holes or of too many words, and more tokens than asked for, or too few."""
    masking = NgramMasking(tokenizer, max_ngram=max_ngram, mlm_probability=probability)
    seen = set()
    num_chosen = num_tokens = 0
    for token_ids in sequences:
        words = masking.words(token_ids)
        starts, stops = [word.start for word in words], [word.stop for word in words]
        ngrams = masking.choose(token_ids)
        for ngram in ngrams:
            num_words = stops.index(ngram.stop) - starts.index(ngram.start) + 1
            assert 1 <= num_words <= max_ngram
            assert not set(tokenizer.all_special_ids) & {token_ids[position] for position in ngram}
            seen.add(num_words)
        positions, length = list(chain(*ngrams)), sum(map(len, words))
        assert len(positions) == len(set(positions))
        most = max(probability * length, min(map(len, words)))  # where no word fits, the shortest
        assert 1 <= len(positions) <= most
        if len(token_ids) > 50:
            num_chosen, num_tokens = num_chosen + len(positions), num_tokens + length
    assert seen == set(range(1, max_ngram + 1))
    assert num_chosen / num_tokens > 0.95 * probability  # sequences are whole, so that some end just below it


def test_number_of_tokens_of_words_of_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches a number of tokens that is rounded the wrong way."""
    masking, the = NgramMasking(tokenizer), _the(tokenizer)
    expected = {1: 1, 6: 1, 13: 1, 14: 2, 20: 3, 40: 6, 100: 15}
    assert {n: sum(map(len, masking.choose([the] * n))) for n in expected} == expected


def test_ngrams_by_one_over_n(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches n-grams drawn with other weights than 1/n: 6/11, 3/11 and 2/11."""
    token_ids = [_the(tokenizer)] * 4000
    torch.manual_seed(0)
    masking = NgramMasking(tokenizer, mlm_probability=0.05)  # few, so that hardly any n-gram runs into another
    lengths = Counter(len(ngram) for _ in range(30) for ngram in masking.choose(token_ids))
    # About 3700 n-grams: two standard deviations are 0.016. A few are shortened.
    for length, share in {1: 6 / 11, 2: 3 / 11, 3: 2 / 11}.items():
        assert lengths[length] / lengths.total() == pytest.approx(share, abs=0.03)


def test_every_word_has_its_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches a choice that prefers the start of a sequence."""
    token_ids = [_the(tokenizer)] * 40
    torch.manual_seed(0)
    masking = NgramMasking(tokenizer, max_ngram=1)
    counts = Counter(position for _ in range(1000) for ngram in masking.choose(token_ids) for position in ngram)
    # 150 expected for each of 40 positions, with a standard deviation of 11.
    assert len(counts) == 40
    assert all(100 < count < 200 for count in counts.values())


def test_no_word_short_enough(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches a sequence of long words that nothing is asked of, a word masked in part, or a special one asked for."""
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("zyqxwvu", "jkzqvwxh")]
    assert min(map(len, words)) > 2
    token_ids = [tokenizer.cls_token_id, *words[0], *words[1], tokenizer.sep_token_id]
    masking = NgramMasking(tokenizer)
    assert masking.choose(token_ids) == [min(masking.words(token_ids), key=len)]
    assert masking.choose(tokenizer("")["input_ids"]) == []


def test_eighty_ten_ten(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches wrong shares of [MASK], random and kept tokens, changes elsewhere, and special tokens put in."""
    ids = _the(tokenizer)
    input_ids = torch.full((200, 500), ids)
    is_chosen = torch.arange(500).expand(200, 500) % 2 == 0
    torch.manual_seed(0)
    seen = NgramMasking(tokenizer).replace(input_ids, is_chosen)
    assert (input_ids == ids).all()
    assert (seen[~is_chosen] == ids).all()
    counts = Counter(seen[is_chosen].tolist())
    masked, kept = counts.pop(tokenizer.mask_token_id), counts.pop(ids)
    # 50,000 tokens: three standard deviations are 0.005.
    assert masked / 50_000 == pytest.approx(0.8, abs=0.006)
    assert kept / 50_000 == pytest.approx(0.1, abs=0.006)
    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    assert set(counts) == ordinary - {ids}  # about 8 of each


def test_tokenizers_without_words_or_mask_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches tokenizers whose every token would silently pass for a word, or whose [MASK] would be None."""
    with pytest.raises(DataError, match="GPT2Tokenizer does not say which of its tokens continue a word"):
        NgramMasking(GPT2TokenizerFast())
    without_mask = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]")
    with pytest.raises(DataError, match="has no mask token"):
        NgramMasking(without_mask)


@pytest.mark.parametrize("numbers", [{"mlm_probability": 0.0}, {"mlm_probability": 15}, {"max_ngram": 0}])
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any]) -> None:
    """Catches a percentage taken for a probability."""
    with pytest.raises(DataError, match=r"mlm_probability=.*, max_ngram="):
        NgramMasking(BertTokenizerFast(), **numbers)
