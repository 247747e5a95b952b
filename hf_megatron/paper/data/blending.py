"""Sequences of one source or several, shuffled without a list of them, in the same order at every layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_megatron.errors import DataError
from hf_megatron.paper.data.packing import PackedDocuments
from hf_megatron.paper.data.token_files import TokenFile

_ROUNDS = 6
_FEWEST_BITS = 6  # with fewer, some orders are far likelier than others
_MASK = (1 << 64) - 1


class Permutation:
    """A random order of ``range(size)`` that takes no memory: each place is computed.

    A Feistel network permutes the numbers of as few bits as hold ``size``; one that is too large is permuted again,
    until it is in the range ("cycle walking"; Black and Rogaway 2002, Ciphers with arbitrary finite domains).
    """

    def __init__(self, size: int, *key: int) -> None:
        self._size = size
        bits = max(_FEWEST_BITS, (size - 1).bit_length())
        self._widths = (bits // 2, bits - bits // 2)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __getitem__(self, place: int) -> int:
        number = self._permuted(place)
        while number >= self._size:
            number = self._permuted(number)
        return number

    def _permuted(self, number: int) -> int:
        left_bits, right_bits = self._widths
        left, right = number >> right_bits, number & ((1 << right_bits) - 1)
        for key in self._keys:
            # The halves change places, and with them their widths.
            left, right = right, left ^ (_mixed(right ^ key) & ((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return left << right_bits | right


_permutation = lru_cache(maxsize=256)(Permutation)


def _mixed(number: int) -> int:
    """A number of 64 bits of which each depends on all of the given one: the finalizer of SplitMix64."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31


class ShuffledBlend(Dataset[dict[str, torch.Tensor]]):
    """Sequences of several sources in random order, of each source as many as its weight asks for.

    It orders itself, so that neither memory nor the time to start grows with the data: train with
    ``TrainingArguments(train_sampling_strategy="sequential")``. Each pass has another order, which Trainer asks for
    with :meth:`set_epoch`. A pass ends where the first source does. The next one goes on in the others, and no source
    repeats a sequence before it has given all.

    Args:
        sources: Sequences to choose from.
        weights: The share of each source in a pass, in any unit; by default each gives all that it has.
        seed: Decides the order.
        multiple_of: The length of a pass is rounded up to a multiple of it. With the sequences of a step, every step is
            whole, and the same at every layout.

    Raises:
        DataError: A weight is not positive, or so small that a pass has no sequence of its source.
    """

    def __init__(
        self,
        sources: Sequence[PackedDocuments],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        multiple_of: int = 1,
    ) -> None:
        sizes = [len(source) for source in sources]
        weights = sizes if weights is None else weights
        if not sources or len(weights) != len(sources) or not all(0 < weight < math.inf for weight in weights):
            raise DataError(f"{len(sources)} sources need as many weights above 0, and these are given: {weights}.")
        shares = [weight / math.fsum(weights) for weight in weights]
        one_pass = min(size / share for size, share in zip(sizes, shares, strict=True))
        self._size = math.ceil(round(one_pass, 6) / multiple_of) * multiple_of
        # As many of each as fit, and the rest to those whose share is cut most.
        counts = [math.floor(self._size * share) for share in shares]
        by_rest = sorted(range(len(sources)), key=lambda i: counts[i] - self._size * shares[i])
        for i in by_rest[: self._size - sum(counts)]:
            counts[i] += 1
        if not all(counts):
            least = counts.index(0)
            raise DataError(
                f"A pass of {self._size:,} sequences has none of source {least + 1}, whose weight is {weights[least]} "
                f"of {math.fsum(weights)}: raise its weight, or leave it out."
            )
        self._sources, self._counts, self._seed = sources, counts, seed
        self._ends = list(accumulate(counts))
        # In shared memory, where worker processes that outlive a pass see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass, from 0 on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A sequence of this pass."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        epoch = int(self._epoch)
        place = _permutation(self._size, self._seed, epoch)[index]
        number = next(i for i, end in enumerate(self._ends) if place < end)
        source, count = self._sources[number], self._counts[number]
        taken = epoch * count + place - (self._ends[number] - count)
        turn, place = divmod(taken, len(source))
        return source[_permutation(len(source), self._seed, number, turn)[place]]


def open_token_files(arguments: Sequence[str], *, seed: int, multiple_of: int = 1, **packing: Any) -> ShuffledBlend:
    """A blend of token files, from ``PREFIX ...``, or ``WEIGHT PREFIX ...`` as for Megatron-LM's ``--data-path``.

    ``packing`` is for :class:`PackedDocuments`.
    """
    weights = [weight for weight in map(_weight, arguments[::2]) if weight is not None]
    is_weighted = len(arguments) % 2 == 0 and 2 * len(weights) == len(arguments)
    prefixes = arguments[1::2] if is_weighted else arguments
    sources = [PackedDocuments(TokenFile(prefix), **packing) for prefix in prefixes]
    return ShuffledBlend(sources, weights if is_weighted else None, seed=seed, multiple_of=multiple_of)


def _weight(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
