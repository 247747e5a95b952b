"""Ranks of a tensor-parallel group that read, draw, hold or decide something else than their peers.

Each case ends in our own error that says what differs, or right; none in a hang, and none in a model that is nobody's.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_megatron import MegatronTrainer
from hf_megatron.errors import RanksDifferError
from hf_megatron.tensor_parallel.agreement import digests_of
from tests.distributed import RankFailedError
from tests.live import on_live_ranks
from tests.models.reference import Pool, rank
from tests.training.runs import (
    DROPOUT,
    LAYOUTS,
    Log,
    Run,
    Step,
    assert_same_steps,
    examples,
    layouts,
    make_trainer,
    names_in,
    on_ranks,
)


def _shift(model: Any) -> None:
    model.get_parameter("transformer.ln_f.weight").data.add_(0.01)


# What a callback may do, by name, for that travels to the ranks.
_ACTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "draw": lambda control, model: torch.rand(1),
    "shift": lambda control, model: _shift(model),
    "scale": lambda control, model: [parameter.data.mul_(1.001) for parameter in model.parameters()],
    "stop": lambda control, model: setattr(control, "should_training_stop", True),
    "save": lambda control, model: setattr(control, "should_save", True),
    "evaluate": lambda control, model: setattr(control, "should_evaluate", True),
    "wait": lambda control, model: time.sleep(2),
}


class After(TrainerCallback):
    """Does something after a step, on the last rank alone."""

    def __init__(self, step: int, action: str) -> None:
        self.step, self.action = step, _ACTIONS[action]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and rank() == args.world_size - 1:
            self.action(control, kwargs["model"])


class Shorter(IterableDataset[Any]):
    """A stream that ends earlier on a rank."""

    def __iter__(self) -> Iterator[Any]:
        yield from examples()[: 48 - 16 * rank()]


_DATA: dict[str, Callable[[], Any]] = {
    "of its own": lambda: examples(seed=rank()),
    "other ones from the fifth batch": lambda: examples()[:40] + examples(8, seed=rank()),
    "more": lambda: examples(48 + 8 * rank()),
    "a shorter stream": Shorter,
}


def _masked(batch: list[Any]) -> dict[str, torch.Tensor]:
    """Words are masked by a generator that nobody seeded alike."""
    ids = torch.stack([example["input_ids"] for example in batch])
    chooser = random.Random(rank())
    keep = torch.tensor([[chooser.random() < 0.8 for _ in row] for row in ids])
    return {"input_ids": torch.where(keep, ids, 1), "labels": ids}


def _longer(batch: list[Any]) -> dict[str, torch.Tensor]:
    """Rows are padded to another length on each rank, at which the collectives of a layer would abort."""
    ids = torch.stack([example["input_ids"] for example in batch])
    ids = nn.functional.pad(ids, (0, 2 * rank()), value=1)
    return {"input_ids": ids, "labels": ids}


def _message(run: Run, action: str | None = None, step: int = 3, every: int = 2, **options: Any) -> str:
    """The error that a run ends with."""
    made = {name: _DATA[value]() if name.endswith("dataset") else value for name, value in options.items()}
    trainer = make_trainer(run, rank_check_steps=every, **made)
    if action is not None:
        trainer.add_callback(After(step, action))
    try:
        trainer.train()
    except RanksDifferError as error:
        return f"{error}\n{''.join(error.__notes__)}"
    return "nothing was noticed"


@pytest.mark.parametrize(
    ("action", "step", "every", "saves", "expected"),
    [
        ("draw", 3, 2, "steps", "random generator of the CPU: rank 1 differs from rank 0"),
        ("shift", 3, 2, "steps", "parameter transformer.ln_f.weight: rank 1 differs from rank 0"),
        ("scale", 3, 2, "steps", "more"),
        ("draw", 5, 100, "no", "At: the end of training, after step 6"),
        ("draw", 2, 100, "steps", "At: before the checkpoint of step 3"),
    ],
)
def test_what_a_callback_of_one_rank_does_is_found(
    pool: Pool, gpt2: Path, tmp_path: Path, action: str, step: int, every: int, saves: str, expected: str
) -> None:
    """Catches replicas and dropout masks that drift apart, and a model or a checkpoint that is written all the same."""
    run = Run(gpt2, tmp_path, layout=LAYOUTS["tp2"], arguments={"save_strategy": saves}, config=DROPOUT)
    message = on_ranks(pool, _message, run, action, step, every)
    assert expected in message
    assert f"They were equal at: before the step after step {2 if every == 2 else 0}." in message
    assert "On rank 0 of 2" in message
    assert not list(tmp_path.glob("*checkpoint*"))


_DIFFERS = "batch['input_ids']: rank 1 differs from rank 0"


@pytest.mark.parametrize(
    ("options", "arguments", "expected"),
    [
        ({"train_dataset": "of its own"}, {}, _DIFFERS),
        ({"train_dataset": "of its own"}, {"eval_on_start": True}, f"At: before the step after step 0. {_DIFFERS}"),
        ({"train_dataset": "other ones from the fifth batch"}, {}, "differs from rank 0"),
        ({"train_dataset": "more"}, {}, "number of steps in an epoch (6, 7 on ranks 0, 1)"),
        ({"data_collator": _masked}, {}, _DIFFERS),
        ({"data_collator": _longer}, {}, _DIFFERS),
        ({"train_dataset": "a shorter stream"}, {}, "number of batches (1, 0 on ranks 0, 1)"),
    ],
)
def test_data_that_depend_on_the_rank_are_found(
    pool: Pool, gpt2: Path, tmp_path: Path, options: dict[str, Any], arguments: dict[str, Any], expected: str
) -> None:
    """Catches ranks that compute parts of different examples or wait for others, also behind an evaluation's batch."""
    message = on_ranks(pool, _message, Run(gpt2, tmp_path, layout=LAYOUTS["tp2"], arguments=arguments), **options)
    assert expected in message
    assert "The usual cause: a" in message


@pytest.mark.parametrize("layout", layouts("tp2 x fsdp2", "tp2 x replicate2"))
def test_the_group_that_drifts_apart_is_named(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches comparisons over all ranks, of which those of other groups rightly read other batches."""
    run = Run(gpt2, tmp_path, layout=LAYOUTS[layout], config=DROPOUT)
    with pytest.raises(RankFailedError, match=r"RanksDifferError: .*rank 3 differs from rank 2"):
        pool(4).run(_draw_on_the_last_rank, run, timeout=120)


def _draw_on_the_last_rank(run: Run) -> None:
    trainer = make_trainer(run, rank_check_steps=2)
    trainer.add_callback(After(3, "draw"))
    trainer.train()


def _train_in_an_own_order(trainer: MegatronTrainer) -> None:
    trainer._get_train_sampler = lambda *_: list(range(48))[:: 1 - 2 * rank()]  # type: ignore[method-assign]
    trainer.train()


def _evaluate_other_weights(trainer: MegatronTrainer) -> None:
    if rank() == 1:
        _shift(trainer.model)
    trainer.evaluate()


_STARTS: dict[str, tuple[Callable[[MegatronTrainer], Any], str]] = {
    "order": (_train_in_an_own_order, "batch['input_ids']: rank 1"),
    "examples": (
        lambda trainer: trainer.evaluate(examples(11, seed=rank())),
        "At: the first batch of an evaluation after step 0. batch[",
    ),
    "number": (lambda trainer: trainer.evaluate(examples(5 + 4 * rank())), "number of batches (2, 3 on ranks 0, 1)"),
    "weights": (
        _evaluate_other_weights,
        "parameter transformer.ln_f.weight: rank 1 differs from rank 0. They were not compared before.",
    ),
}


@pytest.mark.parametrize("start", _STARTS)
@on_live_ranks(2, timeout=240)
def test_what_depends_on_the_rank_is_found_from_the_start(gpt2: Path, tmp_path: Path, start: str) -> None:
    """Catches an order that each rank chooses, metrics of other examples, and whole weights that one rank changed."""
    action, expected = _STARTS[start]
    with pytest.raises(RanksDifferError) as caught:
        action(make_trainer(Run(gpt2, tmp_path, layout=LAYOUTS["tp2"])))
    assert expected in str(caught.value)


def _steps(run: Run, action: str) -> tuple[int, list[float]]:
    """The number of steps, and the losses on the evaluation data that were logged."""
    trainer = make_trainer(run)
    trainer.add_callback(After(4, action))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return trainer.state.global_step, losses


@pytest.mark.parametrize(
    ("action", "steps", "checkpoints", "evaluations"),
    [("stop", 4, "3", 0), ("save", 6, "346", 0), ("evaluate", 6, "36", 1), ("wait", 6, "36", 0)],
)
def test_what_a_callback_of_one_rank_asks_for_all_do(
    pool: Pool, gpt2: Path, tmp_path: Path, action: str, steps: int, checkpoints: str, evaluations: int
) -> None:
    """Catches ranks that wait for ever, because one stopped at its own clock or got a signal first; late ones too."""
    results = pool(2).run(_steps, Run(gpt2, tmp_path, layout=LAYOUTS["tp2"]), action)
    assert results[0] == results[1]
    assert (results[0][0], len(results[0][1])) == (steps, evaluations)
    assert names_in(tmp_path) == [f"checkpoint-{step}" for step in checkpoints]


def _train_own(run: Run) -> list[Step]:
    log = Log()
    trainer = make_trainer(run, log)
    trainer.model.transformer.ln_f.register_forward_hook(
        lambda module, inputs, output: nn.functional.dropout(output, 0.3, training=module.training)
    )
    trainer.train()
    return log.steps


def test_dropout_in_a_users_own_module_is_the_same_at_every_degree(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches a random stream that differs on the ranks, or depends on the degree."""
    run = Run(gpt2, tmp_path / "one", config=DROPOUT, arguments={"save_strategy": "no"})
    expected = _train_own(run)
    steps = on_ranks(pool, _train_own, replace(run, output=tmp_path / "two", layout=LAYOUTS["tp2"]))
    assert_same_steps(steps, expected)


def test_what_was_compared_can_be_freed() -> None:
    """Catches a model under FSDP that cannot be saved after two evaluations: numpy makes a storage's size final."""
    parameter = torch.ones(3, 2)
    digests_of({"weight": parameter}, "model")
    parameter.untyped_storage().resize_(0)
    assert parameter.untyped_storage().size() == 0
