"""Iterable data sets: the same batches at every layout, and resuming at the right position.

Every rank of a tensor-parallel model reads the stream itself and takes its data-parallel part of each batch. By
default, accelerate's first rank reads and distributes the batches, which gives all data-parallel groups the same
examples, and different examples to the ranks of a group after resuming.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerState


class Stream(IterableDataset[Any]):
    """Wraps an iterable data set so that its order depends on the epoch but not on the layout.

    accelerate would deal out the files of a ``datasets.IterableDataset`` rather than its examples, and would seed a
    stream's ``generator`` under data parallelism alone.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[Any]:
        yield from self.examples

    def __len__(self) -> int:
        return len(self.examples)  # raises TypeError if the data set has no length, as expected

    def set_epoch(self, epoch: int) -> None:
        """Set the order of the next pass, in one of the two ways that Trainer documents."""
        generator = getattr(self.examples, "generator", None)
        if hasattr(self.examples, "set_epoch"):
            self.examples.set_epoch(epoch)
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(epoch)


def place_in_stream(checkpoint: Path) -> tuple[int, int]:
    """Position at which a run stopped: complete passes through the data, and steps in the current pass.

    Trainer treats a stream as endless: each pass is an epoch, and a step advances the epoch by 1 / ``max_steps``. When
    resuming, Trainer itself would assign all steps to the first pass.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    passes = max(0, math.ceil(state.epoch) - 1)
    return passes, round((state.epoch - passes) * state.max_steps)
