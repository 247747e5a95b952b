"""Documents packed into full sequences, as the paper's GPT-2 is trained.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 4.2, and the data loader of Megatron-LM.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_megatron.errors import DataError
from hf_megatron.paper.data.token_files import Array, TokenFile


class _TokensInMemory:
    """The tokens of documents, each with a token after it; empty documents are skipped."""

    path = "the documents"

    def __init__(self, documents: Iterable[Sequence[int]], end_of_document: int) -> None:
        tokens = array("i")
        for document in documents:
            if len(document):
                tokens.extend(document)
                tokens.append(end_of_document)
        self._tokens = np.array(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> Array:
        return self._tokens[start:stop].astype(np.int64)


class PackedDocuments(Dataset[dict[str, torch.Tensor]]):
    """Full sequences cut from all documents in a row; the rest at the end is dropped.

    The last token of a sequence is the first of the next, so that every token but the first is predicted once.
    Attention crosses the ends of documents, as in Megatron-LM by default.

    Args:
        documents: The token ids of each document, without special tokens; empty ones are skipped. Or a file of tokens,
            which stay there; it has the tokens between documents already.
        length: Tokens per sequence, usually the model's longest; DataError if there are too few for one.
        end_of_document: The id of the token after each document; GPT-2's ``<|endoftext|>``.
        separate_documents: Whether each document of a sequence is alone there: positions begin anew after each
            ``end_of_document``, by which transformers' models also know what not to attend to. Megatron-LM has
            ``--reset-position-ids --reset-attention-mask`` for it. DataError if documents of a file do not end with it.
        vocab_size: Raise DataError for a token that a vocabulary of this size does not have.
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int]] | TokenFile,
        *,
        length: int,
        end_of_document: int,
        separate_documents: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self._tokens: TokenFile | _TokensInMemory
        if isinstance(documents, TokenFile):
            self._tokens = documents
            if separate_documents:
                documents.require_ends(end_of_document)
        else:
            self._tokens = _TokensInMemory(documents, end_of_document)
        if length < 2 or len(self._tokens) < length:
            raise DataError(
                f"{len(self._tokens)} tokens do not make a sequence of {length}: choose a length of at least 2, "
                "and give as many tokens."
            )
        self._length, self._end = length, end_of_document
        self._separate_documents, self._vocab_size = separate_documents, vocab_size

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // (self._length - 1)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels``, the same [length] ids, as the model shifts the labels; and positions."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * (self._length - 1)
        tokens = self._tokens.read(start, start + self._length)
        if self._vocab_size is not None and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise DataError(
                f"{self._tokens.path} has tokens {tokens.min()} to {tokens.max()} from token {start:,} on, and the "
                f"vocabulary has {self._vocab_size}: it was made with another tokenizer."
            )
        input_ids = torch.from_numpy(tokens)
        example = {"input_ids": input_ids, "labels": input_ids.clone()}
        if self._separate_documents:
            place = torch.arange(self._length)
            begins = torch.zeros_like(place)
            begins[1:] = torch.where(input_ids[:-1] == self._end, place[1:], 0)
            example["position_ids"] = place - begins.cummax(0).values
        return example
