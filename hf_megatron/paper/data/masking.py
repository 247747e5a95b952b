"""Which tokens a masked language model predicts, what it sees in their place, and the collator that makes batches.

Whole words are chosen, one to three in a row, n words with a probability proportional to 1/n, until 15% of the tokens
are chosen.

Shapes: B batch, S sequence.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 4.2; whole-word n-grams: Joshi et al. 2019, arXiv:1907.10529; the
weights 1/n: Lan et al. 2019, arXiv:1909.11942; 80/10/10, drawn for each token: BERT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from hf_megatron.errors import DataError
from hf_megatron.paper.data.tokens import special_token_id

_MASKED_SHARE = 0.8
_RANDOM_SHARE = 0.1
_ORDER = "sentence_order_label"
_SEED = "masking_seed"
_IGNORED = -100


class NgramMasking:
    """Whole-word n-gram masking.

    Args:
        tokenizer: A fast tokenizer that marks the tokens that continue a word, as WordPiece does with ``##``; DataError
            for others, and for one without ``[MASK]``.
        mlm_probability: Largest share of a sequence's tokens to choose, special tokens not counted.
        max_ngram: Largest number of words in a row that are chosen together.
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
        """Draw the n-grams of one sequence that the model predicts: their positions, without overlap.

        Together they hold at most ``mlm_probability`` of the tokens, or one word, the shortest, if all are longer than
        that. The list is empty if there are only special tokens. torch's default generator is used if None is given.
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
        """What the model sees of the tokens [...], of which some are chosen [..., bool]; [...].

        Of the chosen tokens 80% become ``[MASK]``, 10% a random token that is not special, 10% stay.
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


@dataclass
class DataCollatorForMegatronBertPretraining:
    """Pads examples to a batch and masks whole words and n-grams of them, anew each time.

    All ranks of a tensor-parallel group must make the same batch. They do if they have the same examples and draw the
    same numbers: from ``seed``, or from torch's default generator, which building or loading a model with
    ``distributed_config`` makes equal within a group. DataLoader workers are seeded by their number, so that this holds
    with workers too.

    An example with a ``masking_seed``, an integer from 0 on, is masked by that alone: alike at every layout and after
    a resume. Without, a resumed run masks differently, since the batch that comes next was drawn before the random
    state was saved. Give each example a seed of its own, and ``remove_unused_columns=False`` to the arguments.

    The first three arguments, and their errors, are those of :class:`NgramMasking`.
    """

    tokenizer: PreTrainedTokenizerBase
    mlm_probability: float = 0.15
    max_ngram: int = 3
    pad_to_multiple_of: int | None = None  # pad to the longest example if None
    seed: int | None = None  # of the collator's own random stream; torch's default generator is used if None
    _masking: NgramMasking = field(init=False, repr=False)
    _generator: torch.Generator | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self._masking = NgramMasking(self.tokenizer, mlm_probability=self.mlm_probability, max_ngram=self.max_ngram)
        special_token_id(self.tokenizer, "pad")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of B examples as :func:`sentence_order_pairs` or the tokenizer gives them.

        They have ``input_ids`` with special tokens, ``token_type_ids`` (zeros if absent), ``masking_seed`` if masks are
        to depend on it alone, and all or none of them ``sentence_order_label``; DataError if only some do, or one has
        nothing but special tokens.

        Returns:
            On the CPU: ``input_ids``, ``attention_mask``, ``token_type_ids`` and ``labels``, [B, S], with labels of
            -100 where nothing is predicted; ``masked_positions`` [B, M], where there are labels, filled up with other
            positions; and ``sentence_order_label`` [B], if the examples have it.
        """
        sequences = [torch.as_tensor(example["input_ids"], dtype=torch.long) for example in examples]
        types = [
            torch.as_tensor(example.get("token_type_ids", [0] * len(ids)), dtype=torch.long)
            for example, ids in zip(examples, sequences, strict=True)
        ]
        pad_id = special_token_id(self.tokenizer, "pad")
        are_chosen, seen = [], []
        for example, ids in zip(examples, sequences, strict=True):
            seed = example.get(_SEED)
            generator = self._random_stream() if seed is None else torch.Generator().manual_seed(int(seed))
            are_chosen.append(self._choose(ids, generator))
            seen.append(self._masking.replace(ids, are_chosen[-1], generator))
        chosen, input_ids = self._pad(are_chosen, 0), self._pad(sequences, pad_id)
        most = int(chosen.sum(1).max())
        batch = {
            "input_ids": self._pad(seen, pad_id),
            "attention_mask": self._pad([torch.ones_like(ids) for ids in sequences], 0),
            "token_type_ids": self._pad(types, 0),
            "labels": input_ids.masked_fill(~chosen, _IGNORED),
            "masked_positions": chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most],
        }
        orders = [int(example[_ORDER]) for example in examples if _ORDER in example]
        if orders:
            if len(orders) < len(examples):
                raise DataError(f"{len(orders)} of {len(examples)} examples have a {_ORDER}; give it to all or none.")
            batch[_ORDER] = torch.tensor(orders)
        return batch

    def _random_stream(self) -> torch.Generator | None:
        if self.seed is not None and self._generator is None:
            worker = get_worker_info()  # each worker has a copy of this collator, and must not repeat the others
            self._generator = torch.Generator().manual_seed(self.seed + (0 if worker is None else worker.id))
        return self._generator

    def _choose(self, token_ids: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """[S] booleans: what to predict."""
        ngrams = self._masking.choose(token_ids.tolist(), generator)
        if not ngrams:
            raise DataError(
                f"an example of {len(token_ids)} tokens has nothing but special ones, so that there is nothing to "
                "predict; leave empty texts out."
            )
        is_chosen = torch.zeros(len(token_ids), dtype=torch.bool)
        is_chosen[[*chain(*ngrams)]] = True
        return is_chosen

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        """[B, S] from B rows, ``value`` to the right of the shorter ones."""
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        return F.pad(padded, (0, -padded.shape[1] % (self.pad_to_multiple_of or 1)), value=value)
