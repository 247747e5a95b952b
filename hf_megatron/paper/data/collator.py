"""Examples to batches for ``MegatronBertForPreTraining`` or ``MegatronBertForMaskedLM``.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from hf_megatron.errors import DataError
from hf_megatron.paper.data.masking import NgramMasking
from hf_megatron.paper.data.tokens import special_token_id

_ORDER = "sentence_order_label"
_IGNORED = -100


@dataclass
class DataCollatorForMegatronBertPretraining:
    """Pads examples to a batch and masks whole words and n-grams of them, anew each time.

    All ranks of a tensor-parallel group must make the same batch. They do if they have the same examples and draw the
    same numbers: from ``seed``, or from torch's default generator, which building or loading a model with
    ``distributed_config`` makes equal within a group, and which Trainer saves and restores. DataLoader workers are
    seeded by their number, so that this holds with workers too.

    Args:
        tokenizer: A fast BERT tokenizer, of any vocabulary.
        mlm_probability: Largest share of each sequence's tokens to predict.
        max_ngram: Largest number of words in a row that are masked together.
        pad_to_multiple_of: Pad to a multiple of this length; to the longest example if None.
        seed: Seed of the collator's own random stream; torch's default generator is used if None.

    Raises:
        DataError: The tokenizer lacks what masking needs, or a number is out of its range.
    """

    tokenizer: PreTrainedTokenizerBase
    mlm_probability: float = 0.15
    max_ngram: int = 3
    pad_to_multiple_of: int | None = None
    seed: int | None = None
    _masking: NgramMasking = field(init=False, repr=False)
    _generator: torch.Generator | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self._masking = NgramMasking(self.tokenizer, mlm_probability=self.mlm_probability, max_ngram=self.max_ngram)
        special_token_id(self.tokenizer, "pad")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            examples: B mappings as :func:`sentence_order_pairs` or the tokenizer gives them: ``input_ids`` with special
                tokens, ``token_type_ids`` (zeros if absent), and ``sentence_order_label`` in all or none of them.

        Returns:
            On the CPU: ``input_ids``, ``attention_mask``, ``token_type_ids`` and ``labels``, [B, S], with labels of
            -100 where nothing is predicted; and ``sentence_order_label`` [B], if the examples have it.

        Raises:
            DataError: An example has nothing but special tokens, or only some have a ``sentence_order_label``.
        """
        generator = self._random_stream()
        sequences = [torch.as_tensor(example["input_ids"], dtype=torch.long) for example in examples]
        types = [
            torch.as_tensor(example.get("token_type_ids", [0] * len(ids)), dtype=torch.long)
            for example, ids in zip(examples, sequences, strict=True)
        ]
        chosen = self._pad([self._choose(ids, generator) for ids in sequences], 0)
        input_ids = self._pad(sequences, special_token_id(self.tokenizer, "pad"))
        batch = {
            "input_ids": self._masking.replace(input_ids, chosen, generator),
            "attention_mask": self._pad([torch.ones_like(ids) for ids in sequences], 0),
            "token_type_ids": self._pad(types, 0),
            "labels": input_ids.masked_fill(~chosen, _IGNORED),
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
        for ngram in ngrams:
            is_chosen[ngram.start : ngram.stop] = True
        return is_chosen

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        """[B, S] from B rows, ``value`` to the right of the shorter ones."""
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        return F.pad(padded, (0, -padded.shape[1] % (self.pad_to_multiple_of or 1)), value=value)
