"""Streams of examples: the same batches at every layout, and a resumed run that goes on where it stopped."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from hf_megatron.errors import RanksDifferError, UnsupportedError
from tests.models.reference import Pool, assert_all_equal, rank
from tests.tiers import cases
from tests.training.runs import (
    DROPOUT,
    LAYOUTS,
    NUM_EXAMPLES,
    Run,
    Step,
    assert_same_steps,
    examples,
    make_trainer,
    on_ranks,
    train,
)

Example = dict[str, torch.Tensor]


class Shuffled(IterableDataset[Example]):
    """Examples of which nobody knows how many there are, in another order in each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Example]:
        order = torch.randperm(NUM_EXAMPLES, generator=torch.Generator().manual_seed(self.epoch))
        data = examples()
        yield from (data[i] for i in order)


class Generated(IterableDataset[Example]):
    """The same by an attribute that Trainer seeds."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[Example]:
        data = examples()
        yield from (data[i] for i in torch.randperm(NUM_EXAMPLES, generator=self.generator))


class Given(IterableDataset[Example]):
    """What a function gives."""

    def __init__(self, make: Callable[[], list[Example]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Example]:
        yield from self.make()


def _of_two_files(files: list[int]) -> Iterator[Example]:
    for file in files:
        yield from examples(NUM_EXAMPLES // 2, seed=file)


def _hub_stream() -> datasets.IterableDataset:
    stream = datasets.IterableDataset.from_generator(_of_two_files, gen_kwargs={"files": [0, 1]})
    return stream.shuffle(seed=3, buffer_size=10)


STREAMS = {"shuffled": Shuffled, "generated": Generated, "hub": _hub_stream}


def _train(run: Run, stream: str) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """Ten steps, of which the seventh begins the second pass."""
    run = replace(run, arguments={"max_steps": 10, "save_steps": 4, **run.arguments})
    return train(run, train_dataset=STREAMS[stream]())


@cases(
    "stream, layout",
    [
        *(("shuffled", layout) for layout in ("tp2", "tp2 x fsdp2", "tp2 x replicate2")),
        *((stream, "tp2 x fsdp2") for stream in ("generated", "hub")),
    ],
    [("shuffled", "tp2")],
)
def test_every_layout_reads_the_same_batches(pool: Pool, gpt2: Path, tmp_path: Path, stream: str, layout: str) -> None:
    """Catches a stream dealt out to the ranks of a group, read alike by all groups, or ordered by the layout."""
    run = Run(gpt2, tmp_path, arguments={"save_strategy": "no"})
    expected, _ = _train(run, stream)
    assert len({step.loss for step in expected}) == 10
    steps, _ = on_ranks(pool, _train, replace(run, layout=LAYOUTS[layout]), stream)
    assert_same_steps(steps, expected)


@cases(
    "layout, accumulation",
    [("tp2", 1), ("one", 2), ("tp2", 2), ("tp2 x replicate2", 1), ("tp2 x fsdp2", 2)],
    [("tp2", 1)],
)
def test_resuming_changes_no_bit(pool: Pool, gpt2: Path, tmp_path: Path, layout: str, accumulation: int) -> None:
    """Catches a stream that starts over after resuming, is skipped by too much, or by the steps of all passes."""
    batch = 8 // accumulation // (2 if "x" in layout else 1)
    arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(layout, {}), config=DROPOUT, arguments=arguments)
    steps, weights = on_ranks(pool, _train, run, "shuffled")
    for step in (4, 8):  # in the first pass and in the second
        again = replace(run, output=tmp_path / f"again-{step}", resume=run.output / f"checkpoint-{step}")
        resumed_steps, resumed_weights = on_ranks(pool, _train, again, "shuffled")
        assert resumed_steps == steps[step:]
        assert_all_equal(resumed_weights, weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "stream"),
    [("tp2 x replicate2", "tp2", "shuffled"), ("one", "tp2 x fsdp2", "generated"), ("tp2 x fsdp2", "tp4", "hub")],
)
def test_resuming_elsewhere(pool: Pool, gpt2: Path, tmp_path: Path, first: str, second: str, stream: str) -> None:
    """Catches a place in the stream that is counted in batches of one rank."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(first, {}))
    steps, _ = on_ranks(pool, _train, run, stream)
    for step in (4, 8):
        layout = LAYOUTS.get(second, {})
        again = replace(run, output=tmp_path / f"{step}", layout=layout, resume=run.output / f"checkpoint-{step}")
        resumed_steps, _ = on_ranks(pool, _train, again, stream)
        assert_same_steps(resumed_steps, steps[step:])


@pytest.mark.slow
def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches the last step of a run taken for the end of a pass."""
    constant = {"lr_scheduler_type": "constant", "save_steps": 4}
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS["tp2"], arguments={**constant, "max_steps": 4})
    on_ranks(pool, _train, run, "shuffled")
    longer = replace(run, output=tmp_path / "longer", arguments={**constant, "max_steps": 8})
    resumed, _ = on_ranks(pool, _train, replace(longer, resume=run.output / "checkpoint-4"), "shuffled")
    steps, _ = on_ranks(pool, _train, longer, "shuffled")
    assert resumed == steps[4:]


def _refused(run: Run, error: type[Exception]) -> str:
    in_another_order = Given(lambda: random.Random(rank()).sample(examples(), NUM_EXAMPLES))
    with pytest.raises(error) as caught:
        make_trainer(run, train_dataset=in_another_order).train()
    return str(caught.value)


def test_what_ranks_read_in_different_orders_is_refused(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches a group whose ranks compute parts of different examples, which looks like training."""
    run = Run(gpt2, tmp_path, layout=LAYOUTS["tp2"])
    message = on_ranks(pool, _refused, run, RanksDifferError)
    assert "batch['input_ids']: rank 1 differs from rank 0" in message
    assert "set_epoch(epoch)" in message
    run = replace(run, arguments={"accelerator_config": {"dispatch_batches": True}})
    assert "dispatch_batches=True is not supported" in on_ranks(pool, _refused, run, UnsupportedError)


def _predict(run: Run) -> tuple[Any, Any]:
    output = make_trainer(run).predict(Given(lambda: examples(11, seed=1)))  # as many as no batch size divides
    return output.predictions, output.label_ids


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "tp2 x fsdp2"])
def test_predictions_hold_every_example_of_a_stream_once(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches a last batch that is filled up, or the same examples in all groups."""
    predictions, labels = on_ranks(pool, _predict, Run(gpt2, tmp_path, layout=LAYOUTS[layout]))
    expected, expected_labels = _predict(Run(gpt2, tmp_path))
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(predictions, expected, rtol=1e-4, atol=1e-4)
