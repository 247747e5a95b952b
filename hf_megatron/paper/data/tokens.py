"""Tokens of texts, special tokens, and BERT's form of two segments: ``[CLS] first [SEP] second [SEP]``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from hf_megatron.errors import DataError


def special_token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """The id of the token that the tokenizer calls ``name``: ``cls``, ``sep``, ``mask`` or ``pad``; or DataError."""
    token_id: int | None = getattr(tokenizer, f"{name}_token_id")
    if token_id is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no {name} token, which a BERT needs; take a BERT tokenizer, "
            f"or add one: tokenizer.add_special_tokens({{'{name}_token': '[{name.upper()}]'}})."
        )
    return token_id


class Tokens(NamedTuple):
    """A text's token ids, and for each token its first character and the one after its last."""

    ids: list[int]
    spans: list[tuple[int, int]]  # empty if they were not asked for


def tokenize_distinct(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, with_spans: bool = False
) -> dict[str, Tokens]:
    """The tokens of each distinct text, without special tokens."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    # A text may be longer than the model's input: verbose=False leaves out the warning about it.
    encoded = tokenizer(distinct, add_special_tokens=False, return_offsets_mapping=with_spans, verbose=False)
    spans = encoded["offset_mapping"] if with_spans else [[]] * len(distinct)
    return {text: Tokens(*tokens) for text, *tokens in zip(distinct, encoded["input_ids"], spans, strict=True)}


class SegmentPairs:
    """Joins two segments of token ids; DataError if the tokenizer has no ``[CLS]`` or no ``[SEP]``."""

    num_special = 3

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._cls, self._sep = special_token_id(tokenizer, "cls"), special_token_id(tokenizer, "sep")

    def join(self, first: Sequence[int], second: Sequence[int]) -> dict[str, list[int]]:
        """``input_ids``, and ``token_type_ids`` that are 0 up to the first ``[SEP]`` and 1 after it."""
        return {
            "input_ids": [self._cls, *first, self._sep, *second, self._sep],
            "token_type_ids": [0] * (len(first) + 2) + [1] * (len(second) + 1),
        }
