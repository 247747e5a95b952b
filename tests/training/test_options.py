"""Trainer's arguments do under tensor parallelism what they do in one process."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_megatron import MegatronTrainer
from hf_megatron.errors import UnsupportedError
from hf_megatron.planning import MACHINES
from hf_megatron.training import progress
from tests.live import on_live_ranks
from tests.models.reference import Pool, rank
from tests.training.runs import LAYOUTS, Run, assert_same_steps, examples, layouts, make_trainer, on_ranks, train

Example = dict[str, torch.Tensor]


def _padded(batch: list[Example]) -> Example:
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {name: pad([e[name] for e in batch], padding_value=n) for name, n in (("input_ids", 0), ("labels", -100))}


@pytest.mark.parametrize("layout", layouts("tp2", "tp2 x fsdp2"))
def test_grouping_by_length_is_the_same_at_every_layout(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches ranks of a group with batches of different examples, or lengths, whose collectives do not fit."""
    uneven = [{name: value[: 4 + i % 9] for name, value in e.items()} for i, e in enumerate(examples())]
    options: dict[str, Any] = {"train_dataset": uneven, "data_collator": _padded}
    arguments = {"save_strategy": "no", "max_steps": 4, "train_sampling_strategy": "group_by_length"}
    run = Run(gpt2, tmp_path, arguments=arguments)
    expected, _ = train(run, **options)
    assert len({step.tokens for step in expected}) > 1
    steps, _ = on_ranks(pool, train, replace(run, layout=LAYOUTS[layout]), **options)
    if "x" in layout:  # data-parallel ranks pad their own parts, to other lengths
        steps = [replace(step, tokens=e.tokens) for step, e in zip(steps, expected, strict=True)]
    assert_same_steps(steps, expected)


class Counter(TrainerCallback, ExportableState):
    """Counts the steps, and keeps its count in checkpoints."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"count": self.count}, "attributes": {}}


@on_live_ranks(2, timeout=240)
def test_callbacks_go_on_where_they_stopped(gpt2: Path, tmp_path: Path) -> None:
    """Catches checkpoints without the state of callbacks, or with another one on the other ranks."""
    arguments = {"restore_callback_states_from_checkpoint": True}
    for resume in (None, str(tmp_path / "checkpoint-3")):
        trainer = make_trainer(Run(gpt2, tmp_path, layout=LAYOUTS["tp2"], arguments=arguments))
        trainer.add_callback(Counter())
        trainer.train(resume_from_checkpoint=resume)
        assert [c.count for c in trainer.callback_handler.callbacks if isinstance(c, Counter)] == [6]


class _Seen(TrainerCallback):
    """Notes after each step whether a progress bar is drawn."""

    def __init__(self, bar: ProgressCallback) -> None:
        self.bar, self.has_bar = bar, set[bool]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.has_bar.add(self.bar.training_bar is not None)


@on_live_ranks(2, timeout=240)
def test_the_first_rank_alone_draws_progress_and_writes_tensorboard(gpt2: Path, tmp_path: Path) -> None:
    """Catches bars that overwrite one another on the terminal, curves that are written twice, and those left out."""
    arguments = {"save_strategy": "no", "disable_tqdm": False, "report_to": ["tensorboard"]}
    trainer = make_trainer(Run(gpt2, tmp_path, layout=LAYOUTS["tp2"], arguments=arguments))
    seen = _Seen(next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)))
    trainer.add_callback(seen)
    with patch.object(progress, "machine_of_device", return_value=MACHINES["a100-80gb"]):
        trainer.train()
    assert seen.has_bar == {rank() == 0}
    assert seen.bar.training_bar is None
    torch.distributed.barrier()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    content = events.read_bytes()
    for tag in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "seconds_left", "peak_memory_gb"):
        assert content.count(f"train/{tag}".encode()) == 6, tag


@on_live_ranks(2)
def test_what_trainer_counts_per_process_is_refused(gpt2: Path, tmp_path: Path) -> None:
    """Catches a loss that grows with the degree, and ranks of a group that read different batches."""
    trainer = make_trainer(Run(gpt2, tmp_path, layout=LAYOUTS["tp2"]))
    factored = replace(trainer.args, optim="adafactor")
    data: dict[str, Any] = {"train_dataset": examples()}
    with pytest.raises(UnsupportedError, match="average_tokens_across_devices=False with tp_size=2"):
        MegatronTrainer(trainer.model, replace(trainer.args, average_tokens_across_devices=False), **data)
    with pytest.raises(UnsupportedError, match="model_init= with tp_size=2"):
        MegatronTrainer(args=trainer.args, model_init=lambda: trainer.model, **data)
    with pytest.raises(UnsupportedError, match="optim='adafactor' with parameters that are cut"):
        MegatronTrainer(trainer.model, factored, **data)
    own = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    MegatronTrainer(trainer.model, factored, **data, optimizers=(own, None))


@on_live_ranks(2)
def test_what_trainer_does_to_whole_parameters_is_refused(gpt2: Path, tmp_path: Path) -> None:
    """Catches errors of DTensor's and of FSDP's in the first step and in the first evaluation."""
    trainer = make_trainer(Run(gpt2, tmp_path, layout={"tp_size": 1, "fsdp_size": 2}))
    for changes, message in (({"optim": "adafactor"}, "optim='adafactor'"), ({"bf16_full_eval": True}, "Load the")):
        with pytest.raises(UnsupportedError, match=message):
            MegatronTrainer(trainer.model, replace(trainer.args, **changes), train_dataset=examples())


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "sgd", "adagrad", "rmsprop"])
def test_optimizers_step_on_parts_as_on_the_whole(pool: Pool, gpt2: Path, tmp_path: Path, optimizer: str) -> None:
    """Catches an optimizer that takes a part for the whole."""
    run = Run(gpt2, tmp_path / "one", arguments={"optim": optimizer, "save_strategy": "no"})
    expected, _ = train(run)
    steps, _ = on_ranks(pool, train, replace(run, output=tmp_path / "two", layout=LAYOUTS["tp2"]))
    assert_same_steps(steps, expected, tolerance=1e-3)  # they blow up rounding in gradients that are nearly zero


def _operations(run: Run) -> float:
    trainer = make_trainer(run)
    trainer.train()
    return float(trainer.state.total_flos)


def test_operations_do_not_grow_with_the_degree(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches the work of a group counted once for each of its ranks."""
    arguments = {"max_steps": 2, "save_strategy": "no"}
    one, two = (
        on_ranks(pool, _operations, Run(gpt2, tmp_path / name, layout=layout, arguments=arguments))
        for name, layout in (("one", {}), ("two", LAYOUTS["tp2"]))
    )
    assert one == two > 0
