"""Documents packed into full sequences, as the paper's GPT-2 is trained.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 4.2, and the data loader of Megatron-LM.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch.utils.data import Dataset

from hf_megatron.errors import DataError


class PackedDocuments(Dataset[dict[str, torch.Tensor]]):
    """Full sequences cut from all documents in a row; the rest at the end is dropped.

    The last token of a sequence is the first of the next, so that every token but the first is predicted once.
    Attention crosses the ends of documents, as in Megatron-LM by default.

    Args:
        documents: The token ids of each document, without special tokens; empty ones are skipped.
        length: Tokens per sequence, usually the model's longest; DataError if there are too few for one.
        end_of_document: The id of the token after each document; GPT-2's ``<|endoftext|>``.
    """

    def __init__(self, documents: Iterable[Sequence[int]], *, length: int, end_of_document: int) -> None:
        tokens = array("i")
        for document in documents:
            if len(document):
                tokens.extend(document)
                tokens.append(end_of_document)
        if length < 2 or len(tokens) < length:
            raise DataError(
                f"{len(tokens)} tokens do not make a sequence of {length}: choose a length of at least 2, "
                "and give as many tokens."
            )
        self._tokens = torch.frombuffer(tokens, dtype=torch.int32)
        self._length = length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // (self._length - 1)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels``, the same [length] ids; the model shifts the labels."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * (self._length - 1)
        input_ids = self._tokens[start : start + self._length].long()
        return {"input_ids": input_ids, "labels": input_ids.clone()}
