"""Streams of examples, data sets whose length nobody knows: the same batches at every layout, and found again.

Every rank of a tensor-parallel model reads the stream itself and takes its data-parallel part of each batch. By default
accelerate has the first rank read and hand out; that gives all data-parallel groups the same examples, and the ranks of
a group different ones once a run is resumed.
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
    """The examples of any stream, in an order that depends on the epoch and not on the layout.

    accelerate would deal out the files of a ``datasets.IterableDataset`` rather than its examples, and would seed a
    stream's ``generator`` under data parallelism alone.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[Any]:
        yield from self.examples

    def __len__(self) -> int:
        return len(self.examples)  # some have a length; of the others this is a TypeError, as it should be

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, in one of the two ways that Trainer documents."""
        generator = getattr(self.examples, "generator", None)
        if hasattr(self.examples, "set_epoch"):
            self.examples.set_epoch(epoch)
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(epoch)


def place_in_stream(checkpoint: Path) -> tuple[int, int]:
    """Where a run stopped: the passes that it had made through the stream, and the steps in the pass after them.

    Trainer takes a stream for endless: each pass is an epoch, of which a step is one part in ``max_steps``, and its own
    count after resuming puts all steps into the first one.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    passes = max(0, math.ceil(state.epoch) - 1)
    return passes, round((state.epoch - passes) * state.max_steps)
