"""MegatronTrainer: the same numbers at every layout, and checkpoints that resume at any of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from hf_megatron import MegatronGPT2LMHeadModel, MegatronTrainer
from hf_megatron.errors import CheckpointIncompleteError
from tests.models.architectures import BERTS
from tests.models.reference import Pool, Tensors, assert_all_equal, full_weights, reference_loss
from tests.tiers import cases
from tests.training.runs import (
    DROPOUT,
    GLOBAL_BATCH,
    LAYOUTS,
    Run,
    Step,
    assert_close,
    assert_same_steps,
    examples,
    layouts,
    make_trainer,
    names_in,
    on_ranks,
    predict,
    train,
    train_with_moments,
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BERTS[1].save_stock(tmp_path_factory.mktemp("bert"), "ForMaskedLM", num_hidden_layers=1)


# Twenty steps, or more than three epochs; what stops does so in the middle.
TWENTY = {"max_steps": 20, "save_steps": 10}


@pytest.fixture(scope="module")
def in_one_process(
    gpt2: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Run, list[Step], Tensors]]:
    """Twenty steps of a model, by its class, without any parallelism; computed once."""

    @cache
    def run_of(model_class: str) -> tuple[Run, list[Step], Tensors]:
        arguments = {**TWENTY, "save_strategy": "no"}
        model = gpt2 if "GPT2" in model_class else bert
        run = Run(model, tmp_path_factory.mktemp("one"), model_class, arguments=arguments)
        return run, *train(run)

    return run_of


_CLASSES = ("MegatronGPT2LMHeadModel", "MegatronBertForMaskedLM")


@cases(
    "model_class, layout, accumulation",
    [case for case in product(_CLASSES, LAYOUTS, (1, 2)) if case[0] == _CLASSES[0] or case[2] == 2],
    [(_CLASSES[0], "tp2 x fsdp2, split sequences", 2)],
)
def test_every_layout_logs_the_same_steps(
    pool: Pool,
    tmp_path: Path,
    in_one_process: Callable[[str], tuple[Run, list[Step], Tensors]],
    model_class: str,
    layout: str,
    accumulation: int,
) -> None:
    """Catches a loss scaled by the degree, a norm that counts replicas, tokens counted per rank, a batch not shared."""
    run, expected, weights = in_one_process(model_class)
    assert len(expected) == 20
    arguments = {
        **run.arguments,
        "per_device_train_batch_size": GLOBAL_BATCH // (2 if " x " in layout else 1) // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    cut = replace(run, output=tmp_path, layout=LAYOUTS[layout], arguments=arguments)
    steps, cut_weights = on_ranks(pool, train, cut)
    assert_same_steps(steps, expected)
    assert_close(cut_weights, weights)


def _loss(run: Run) -> tuple[float, int]:
    trainer = make_trainer(run)
    batch = trainer.data_collator(examples(8))
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    trainer.model.train()
    return float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).detach()), int(items)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_loss_is_the_mean_of_predictions(pool: Pool, gpt2: Path, tmp_path: Path, layout: str, smoothing: float) -> None:
    """Catches a mean over the first of each row too, as in stock GPT-2, and smoothing that asks for all logits."""
    run = Run(gpt2, tmp_path, layout=LAYOUTS.get(layout, {}), arguments={"label_smoothing_factor": smoothing})
    loss, items = on_ranks(pool, _loss, run)
    batch = {name: torch.stack([e[name] for e in examples(8)]) for name in ("input_ids", "labels")}
    logits = GPT2LMHeadModel.from_pretrained(gpt2)(batch["input_ids"]).logits.detach().double()
    assert items == int((batch["labels"][:, 1:] != -100).sum())
    assert loss == pytest.approx(float(reference_loss(logits, batch["labels"], label_smoothing=smoothing)), rel=1e-6)


@pytest.mark.parametrize("layout", layouts("tp2 x fsdp2"))
def test_predictions_hold_every_example_once(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches rows repeated for each rank of a group, a wrong order, and a last batch cut off or filled up."""
    expected = predict(Run(gpt2, tmp_path / "one"))
    predictions, labels, loss = on_ranks(pool, predict, Run(gpt2, tmp_path / "cut", layout=LAYOUTS[layout]))
    np.testing.assert_allclose(predictions, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(labels, expected[1])
    if "x" not in layout:
        # With data parallelism the last batch is filled up with earlier examples, which count in its mean loss: so
        # does stock Trainer.
        assert loss == pytest.approx(expected[2], rel=1e-5)


@pytest.mark.parametrize("layout", layouts("tp2", "one", *list(LAYOUTS)[1:]))
def test_resuming_at_the_same_layout_changes_no_bit(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches a random stream, a moment, a step counter or a place in the data that is not restored; dropout is on."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(layout, {}), config=DROPOUT, arguments=TWENTY)
    steps, state = on_ranks(pool, train_with_moments, run)
    again = replace(run, output=tmp_path / "again", resume=run.output / "checkpoint-10")
    resumed_steps, resumed_state = on_ranks(pool, train_with_moments, again)
    assert resumed_steps == steps[10:]
    assert_all_equal(resumed_state, state)


_MOVES = [
    ("tp2 x fsdp2", "one"),
    ("tp2", "tp4"),
    ("tp4", "one"),
    ("tp2 x fsdp2", "tp4"),
    ("one", "tp2 x fsdp2"),
    ("tp2 x replicate2", "tp2"),
    ("tp2, split sequences", "tp4"),
    ("tp5", "tp2 x fsdp2"),
    ("tp2", "tp5"),
]


@cases("first, second", _MOVES, [_MOVES[0], _MOVES[-2]])
def test_resuming_at_another_layout(pool: Pool, gpt2: Path, tmp_path: Path, first: str, second: str) -> None:
    """Catches optimizer state that belongs to a layout: other moments, or a fresh optimizer without a word."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(first, {}), arguments=TWENTY)
    steps, state = on_ranks(pool, train_with_moments, run)
    checkpoint = run.output / "checkpoint-10"
    other = replace(run, output=tmp_path / "other", layout=LAYOUTS.get(second, {}), resume=checkpoint)
    resumed_steps, resumed_state = on_ranks(pool, train_with_moments, other)
    assert_same_steps(resumed_steps, steps[10:])
    assert_close(resumed_state, state)


def test_a_checkpoint_without_optimizer_state_says_so(gpt2: Path, tmp_path: Path) -> None:
    """Catches a run that goes on with a fresh optimizer as if nothing had happened."""
    run = Run(gpt2, tmp_path / "run", arguments={"save_only_model": True})
    train(run)
    assert not (run.output / "checkpoint-3" / "optimizer").exists()
    with pytest.raises(CheckpointIncompleteError, match="holds no optimizer state"):
        train(replace(run, arguments={}, resume=run.output / "checkpoint-3"))


def test_an_interrupted_save_is_no_checkpoint(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a half-written directory under a checkpoint's name, which the next run would resume from."""
    run = Run(gpt2, tmp_path / "run")
    trainer = make_trainer(replace(run, arguments={"save_steps": 2, "max_steps": 2}))
    trainer.train()
    with monkeypatch.context() as patch:
        patch.setattr("hf_megatron.training.checkpoints.finish_checkpoint", Mock(side_effect=KeyboardInterrupt))
        trainer = make_trainer(replace(run, arguments={"save_steps": 4, "max_steps": 4}))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in run.output.glob("checkpoint-*")] == ["checkpoint-2"]
    steps, _ = train(replace(run, resume=run.output / "checkpoint-2", arguments={"save_steps": 4, "max_steps": 4}))
    assert [step.step for step in steps] == [3, 4]
    assert names_in(run.output) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("layout", layouts("tp2", "one"))
def test_best_model_at_the_end_and_limit_on_checkpoints(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches weights of the last step where the best were asked for, and a best checkpoint that was rotated away."""
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 8,
        "learning_rate": 0.3,  # so high that an early step is the best one
        "load_best_model_at_end": True,
        "save_total_limit": 2,
    }
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(layout, {}), arguments=arguments)
    best, weights = on_ranks(pool, _train_for_the_best, run)
    kept = {path.name for path in run.output.glob("checkpoint-*")}
    assert Path(best).name in kept
    assert len(kept) == 2
    state = json.loads((run.output / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert_all_equal(full_weights(MegatronGPT2LMHeadModel.from_pretrained(best)), weights)


def _train_for_the_best(run: Run) -> tuple[str, dict[str, torch.Tensor]]:
    trainer = make_trainer(run)
    trainer.train()
    return str(trainer.state.best_model_checkpoint), full_weights(trainer.model)


@pytest.mark.parametrize("layout", layouts("tp2 x fsdp2", "one", "tp2", "tp2 x replicate2"))
def test_one_flag_saves_for_stock_transformers(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches a final model in shards, under our names, or with a copy of the tied head."""
    run = Run(gpt2, tmp_path, layout=LAYOUTS.get(layout, {}), arguments={"max_steps": 1, "save_strategy": "no"})
    weights = on_ranks(pool, _train_and_save, run)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert type(model) is GPT2LMHeadModel
    assert not any(info.values()), info
    assert_all_equal(full_weights(model), weights)
    # Without the flag it is the same tensors with a configuration of ours.
    assert_all_equal(load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "stock/model.safetensors"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) is MegatronGPT2LMHeadModel


def _train_and_save(run: Run) -> Tensors:
    trainer = make_trainer(run)
    trainer.train()
    trainer.save_model(str(run.output / "stock"), stock=True)
    trainer.save_model(str(run.output / "ours"))
    return full_weights(trainer.model)


def test_a_stock_model_is_trained_as_by_the_stock_class(gpt2: Path, tmp_path: Path) -> None:
    """Catches assumptions about the model where it is not one of this package."""
    trainer = make_trainer(Run(gpt2, tmp_path / "ours", arguments={"max_steps": 2, "save_steps": 1}))
    model = GPT2LMHeadModel.from_pretrained(gpt2)
    stock = MegatronTrainer(model, trainer.args, train_dataset=examples())
    stock.train()
    resumed = MegatronTrainer(GPT2LMHeadModel.from_pretrained(gpt2), trainer.args, train_dataset=examples())
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-1"))
    assert_all_equal(full_weights(resumed.model), full_weights(model))
