"""Which tokens a masked language model predicts, and what it sees in their place.

Whole words are chosen, one to three in a row, n words with a probability proportional to 1/n, until 15% of the tokens
are chosen. Of the chosen tokens 80% become ``[MASK]``, 10% become any other token and 10% stay.

Shapes: B batch, S sequence.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 4.2; whole-word n-grams: Joshi et al. 2019, arXiv:1907.10529; the
weights 1/n: Lan et al. 2019, arXiv:1909.11942; 80/10/10, drawn for each token: BERT.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from hf_megatron.errors import DataError
from hf_megatron.paper.data.tokens import special_token_id

_MASKED_SHARE = 0.8
_RANDOM_SHARE = 0.1


class NgramMasking:
    """Whole-word n-gram masking for the vocabulary of one tokenizer.

    Args:
        tokenizer: A fast tokenizer that marks the tokens that continue a word, as WordPiece does with ``##``.
        mlm_probability: Largest share of a sequence's tokens to choose, special tokens not counted.
        max_ngram: Largest number of words in a row that are chosen together.

    Raises:
        DataError: The tokenizer does not mark continuations or has no ``[MASK]``, or a number is out of its range.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, mlm_probability: float = 0.15, max_ngram: int = 3
    ) -> None:
        if not 0 < mlm_probability <= 1 or max_ngram < 1:
            raise DataError(
                f"mlm_probability={mlm_probability}, max_ngram={max_ngram}: choose a probability above 0 and up to 1, "
                "and n-grams of at least one word."
            )
        prefix = _continuation_prefix(tokenizer)
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.mlm_probability = mlm_probability
        self.mask_token_id = special_token_id(tokenizer, "mask")
        self._special = set(tokenizer.all_special_ids)
        self._continuations = {i for token, i in vocabulary.items() if token.startswith(prefix)} - self._special
        self._ordinary = torch.tensor(sorted(set(vocabulary.values()) - self._special))
        self._ngram_weights = 1 / torch.arange(1.0, max_ngram + 1)

    def words(self, token_ids: Sequence[int]) -> list[range]:
        """The positions of each whole word, in order; special tokens belong to none."""
        words: list[range] = []
        is_inside = False  # a continuation after a special token, where a word was cut off, starts a word itself
        for position, token in enumerate(token_ids):
            if token in self._special:
                is_inside = False
            elif is_inside and token in self._continuations:
                words[-1] = range(words[-1].start, position + 1)
            else:
                words.append(range(position, position + 1))
                is_inside = True
        return words

    def choose(self, token_ids: Sequence[int], generator: torch.Generator | None = None) -> list[range]:
        """Choose what the model predicts.

        Args:
            token_ids: S ids of one sequence, with its special tokens.
            generator: What to draw from; torch's default generator if None.

        Returns:
            The positions of each n-gram, in the order they were drawn; they do not overlap. Together they hold at most
            ``mlm_probability`` of the tokens, or one word, the shortest, if all are longer than that. Empty if there
            are only special tokens.
        """
        words = self.words(token_ids)
        if not words:
            return []
        room = int(self.mlm_probability * sum(map(len, words)))
        order = torch.randperm(len(words), generator=generator).tolist()
        drawn = torch.multinomial(self._ngram_weights, len(words), replacement=True, generator=generator) + 1
        ngrams: list[range] = []
        chosen: set[int] = set()
        for first, length in zip(order, drawn.tolist(), strict=True):
            ngram = range(words[first].start, words[first].start)
            for word in words[first : first + length]:  # as many of the drawn number as fit
                is_next = word.start == ngram.stop  # no: a special token stands between
                if not is_next or word.start in chosen or word.stop - ngram.start > room:
                    break
                ngram = range(ngram.start, word.stop)
            if ngram:
                ngrams.append(ngram)
                chosen.update(ngram)
                room -= len(ngram)
            if room == 0:
                break
        return ngrams or [min((words[i] for i in order), key=len)]

    def replace(
        self, input_ids: torch.Tensor, is_chosen: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """What the model sees.

        Args:
            input_ids: [B, S] token ids.
            is_chosen: [B, S] booleans.
            generator: What to draw from; torch's default generator if None.

        Returns:
            [B, S]: 80% of the chosen tokens are ``[MASK]``, 10% random ones that are not special, 10% themselves.
        """
        draw = torch.rand(input_ids.shape, generator=generator)
        other = self._ordinary[torch.randint(len(self._ordinary), input_ids.shape, generator=generator)]
        seen = torch.where(draw < _MASKED_SHARE + _RANDOM_SHARE, other, input_ids)
        seen = seen.masked_fill(draw < _MASKED_SHARE, self.mask_token_id)
        return torch.where(is_chosen, seen, input_ids)


def _continuation_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    prefix: str | None = getattr(getattr(backend, "model", None), "continuing_subword_prefix", None)
    if not prefix:
        raise DataError(
            f"{type(tokenizer).__name__} does not say which of its tokens continue a word, so that whole words cannot "
            "be masked; take a fast tokenizer with a WordPiece model, such as BertTokenizerFast."
        )
    return prefix
