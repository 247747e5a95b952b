"""MegatronTrainer: the same numbers at every layout, and checkpoints that resume at any of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, GPT2LMHeadModel, Trainer

from hf_megatron import MegatronTrainer
from hf_megatron.errors import CheckpointIncompleteError
from tests.models.reference import Pool, save_stock
from tests.training.runs import (
    LAYOUTS,
    Run,
    assert_same_steps,
    examples,
    full_weights,
    make_trainer,
    on_ranks,
    predict,
    train,
)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = BertConfig(
        vocab_size=131,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=12,
        intermediate_size=100,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(directory)
    return directory


_FAST = {
    ("MegatronGPT2LMHeadModel", "tp2", 1),
    ("MegatronGPT2LMHeadModel", "tp4", 1),
    ("MegatronGPT2LMHeadModel", "tp2 x replicate2", 1),
    ("MegatronBertForMaskedLM", "tp2 x fsdp2", 2),
    ("MegatronGPT2LMHeadModel", "tp2 x fsdp2, split sequences", 2),
    ("MegatronBertForMaskedLM", "tp2, split sequences", 1),
}
_GRID = [
    pytest.param(*case, marks=() if case in _FAST else pytest.mark.slow)
    for case in product(("MegatronGPT2LMHeadModel", "MegatronBertForMaskedLM"), LAYOUTS, (1, 2))
]


@pytest.mark.parametrize(("model_class", "layout", "accumulation"), _GRID)
def test_every_layout_logs_the_same_steps(
    pool: Pool, gpt2: Path, bert: Path, tmp_path: Path, model_class: str, layout: str, accumulation: int
) -> None:
    """Catches a loss scaled by the degree, a norm that counts replicas, tokens counted per rank, a batch not shared."""
    model = gpt2 if "GPT2" in model_class else bert
    run = Run(model, tmp_path / "one", model_class, arguments={"save_strategy": "no"})
    expected, weights = train(run)
    layout_sizes = LAYOUTS[layout]
    data_parallel_size = 1 if "x" not in layout else 2
    arguments = {
        "save_strategy": "no",
        "per_device_train_batch_size": 8 // data_parallel_size // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    cut = replace(run, output=tmp_path / "cut", layout=layout_sizes, arguments=arguments)
    steps, cut_weights = on_ranks(pool, train, cut)
    assert_same_steps(steps, expected)
    for name, weight in weights.items():
        assert torch.allclose(cut_weights[name], weight, rtol=1e-4, atol=1e-5), name


def test_one_process_trains_as_stock_trainer_with_the_right_mean(gpt2: Path, tmp_path: Path) -> None:
    """Catches a mean over positions that are not predicted: the first of each row, which stock GPT-2 counts."""
    trainer = make_trainer(Run(gpt2, tmp_path, arguments={"max_steps": 1, "save_strategy": "no"}))
    batch = trainer.data_collator(examples(8))
    loss, items = _loss_of(trainer, batch)
    reference = GPT2LMHeadModel.from_pretrained(gpt2)
    logits = reference(batch["input_ids"]).logits.detach().double()
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert items == int((targets != -100).sum())
    assert loss == pytest.approx(float(expected), rel=1e-6)


def _loss_of(trainer: Trainer, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    return float(loss.detach()), int(items)


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_label_smoothing_reaches_the_vocabulary_parallel_loss(
    pool: Pool, gpt2: Path, tmp_path: Path, layout: str
) -> None:
    """Catches the stock smoother, which would ask for logits that training does not compute."""
    run = Run(gpt2, tmp_path, layout=LAYOUTS.get(layout, {}), arguments={"label_smoothing_factor": 0.1})
    loss = on_ranks(pool, _smoothed_loss, run)
    batch = {name: torch.stack([e[name] for e in examples(8)]) for name in ("input_ids", "labels")}
    logits = GPT2LMHeadModel.from_pretrained(gpt2)(batch["input_ids"]).logits.detach().double()
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    assert loss == pytest.approx(float(expected), rel=1e-6)


def _smoothed_loss(run: Run) -> float:
    trainer = make_trainer(run)
    return _loss_of(trainer, trainer.data_collator(examples(8)))[0]


@pytest.mark.parametrize("layout", ["tp2", "tp2 x fsdp2", pytest.param("tp4", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize(
    "layout",
    ["one", "tp2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("tp2 x fsdp2", "tp2, split sequences"))],
)
def test_resuming_at_the_same_layout_changes_no_bit(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches a random stream, a moment, a step counter or a place in the data that is not restored; dropout is on."""
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(layout, {}), config=dropout)
    steps, weights = on_ranks(pool, train, run)
    again = replace(run, output=tmp_path / "again", resume=run.output / "checkpoint-3")
    resumed_steps, resumed_weights = on_ranks(pool, train, again)
    assert resumed_steps == steps[3:]
    for name, weight in weights.items():
        assert torch.equal(resumed_weights[name], weight), name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tp2", "tp4"),
        ("tp2 x fsdp2", "one"),
        pytest.param("tp4", "one", marks=pytest.mark.slow),
        pytest.param("tp2 x fsdp2", "tp4", marks=pytest.mark.slow),
        pytest.param("one", "tp2 x fsdp2", marks=pytest.mark.slow),
        pytest.param("tp2, split sequences", "tp4", marks=pytest.mark.slow),
    ],
)
def test_resuming_at_another_layout(pool: Pool, gpt2: Path, tmp_path: Path, first: str, second: str) -> None:
    """Catches optimizer state that belongs to a layout: other moments, or a fresh optimizer without a word."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(first, {}))
    steps, weights = on_ranks(pool, train, run)
    other = replace(run, output=tmp_path / "other", layout=LAYOUTS.get(second, {}), resume=run.output / "checkpoint-3")
    resumed_steps, resumed_weights = on_ranks(pool, train, other)
    assert_same_steps(resumed_steps, steps[3:])
    for name, weight in weights.items():
        torch.testing.assert_close(resumed_weights[name], weight, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_without_optimizer_state_says_so(gpt2: Path, tmp_path: Path) -> None:
    """Catches a run that goes on with a fresh optimizer as if nothing had happened."""
    run = Run(gpt2, tmp_path / "run", arguments={"save_only_model": True})
    train(run)
    assert not (run.output / "checkpoint-3" / "optimizer").exists()
    with pytest.raises(CheckpointIncompleteError, match="holds no optimizer state"):
        train(replace(run, arguments={}, resume=run.output / "checkpoint-3"))


def test_an_interrupted_save_is_no_checkpoint(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a half-written directory under a checkpoint's name, which the next run would resume from."""

    def break_off(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    run = Run(gpt2, tmp_path / "run")
    trainer = make_trainer(replace(run, arguments={"save_steps": 2, "max_steps": 2}))
    trainer.train()
    with monkeypatch.context() as patch:
        patch.setattr("hf_megatron.trainer.finish_checkpoint", break_off)
        trainer = make_trainer(replace(run, arguments={"save_steps": 4, "max_steps": 4}))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in run.output.glob("checkpoint-*")] == ["checkpoint-2"]
    steps, _ = train(replace(run, resume=run.output / "checkpoint-2", arguments={"save_steps": 4, "max_steps": 4}))
    assert [step.step for step in steps] == [3, 4]
    assert sorted(path.name for path in run.output.iterdir()) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_best_model_at_the_end_and_the_limit_on_checkpoints(
    pool: Pool, gpt2: Path, tmp_path: Path, layout: str
) -> None:
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
    stored = on_ranks(pool, _weights_of, replace(run, model=Path(best)))
    for name, weight in weights.items():
        assert torch.equal(stored[name], weight), name


def _train_for_the_best(run: Run) -> tuple[str, dict[str, torch.Tensor]]:
    trainer = make_trainer(run)
    trainer.train()
    return str(trainer.state.best_model_checkpoint), full_weights(trainer.model)


def _weights_of(run: Run) -> dict[str, torch.Tensor]:
    return full_weights(make_trainer(run).model)


def test_save_model_leaves_a_directory_for_stock_transformers(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches a final model in shards, or with a copy of the tied head."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS["tp2"], arguments={"max_steps": 1, "save_strategy": "no"})
    on_ranks(pool, _train_and_save, run)
    model, info = GPT2LMHeadModel.from_pretrained(run.output / "final", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.vocab_size == 131


def _train_and_save(run: Run) -> None:
    trainer = make_trainer(run)
    trainer.train()
    trainer.save_model(str(run.output / "final"))


def test_a_stock_model_is_trained_as_by_the_stock_class(gpt2: Path, tmp_path: Path) -> None:
    """Catches assumptions about the model where it is not one of this package."""
    trainer = make_trainer(Run(gpt2, tmp_path / "ours", arguments={"max_steps": 2, "save_steps": 1}))
    model = GPT2LMHeadModel.from_pretrained(gpt2)
    stock = MegatronTrainer(model, trainer.args, train_dataset=examples())
    stock.train()
    resumed = MegatronTrainer(GPT2LMHeadModel.from_pretrained(gpt2), trainer.args, train_dataset=examples())
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-1"))
    for (name, a), b in zip(model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
