"""The paper's recipes, as Trainer carries them out."""

from math import cos, pi, sqrt
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hf_megatron import MegatronBertForPreTraining, MegatronGPT2LMHeadModel, MegatronTrainer
from hf_megatron.errors import PartitionError, UnsupportedError
from hf_megatron.paper.recipe import (
    BERT_PRETRAINING,
    FINETUNING_TASKS,
    GPT2_PRETRAINING,
    Recipe,
    finetuning_recipe,
    scale_residual_outputs,
)
from tests.models.architectures import BERTS, GPT2, ModelCase
from tests.models.reference import Pool, assert_all_equal, full_weights, layout, run_at

GPT2_MODEL = GPT2.config()
BERT_MODEL = BERTS[0].config(num_hidden_layers=8)


def _trainer(arguments: TrainingArguments, model: torch.nn.Module) -> MegatronTrainer:
    trainer = MegatronTrainer(model, arguments, train_dataset=[])
    trainer.create_optimizer_and_scheduler(arguments.max_steps)
    return trainer


def _learning_rates(trainer: MegatronTrainer, steps: int) -> list[float]:
    """The learning rate that each step is taken with."""
    rates = []
    for _ in range(steps):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return rates


@pytest.mark.parametrize(("case", "recipe"), [(GPT2, GPT2_PRETRAINING), (BERTS[0], BERT_PRETRAINING)])
def test_weight_decay_on_matrices_only(tmp_path: Path, case: ModelCase, recipe: Recipe) -> None:
    """Catches decayed biases and norms, and matrices or embeddings that are not decayed; other numbers of AdamW."""
    model = case.build(config=case.config())
    arguments = recipe.arguments(tmp_path, use_cpu=True)
    optimizer = _trainer(arguments, model).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (arguments.max_grad_norm, arguments.activation_checkpointing) == (1.0, True)
    decay: dict[int, float] = {}
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        decay |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.01 if parameter.dim() > 1 else 0.0), name


def test_learning_rate_of_gpt2(tmp_path: Path) -> None:
    """Catches a warm-up that does not shrink with the run, a cosine that ends elsewhere than at the minimum."""
    arguments = GPT2_PRETRAINING.arguments(tmp_path, use_cpu=True, max_steps=300)
    rates = _learning_rates(_trainer(arguments, MegatronGPT2LMHeadModel(GPT2_MODEL)), 300)
    assert rates[:3] == pytest.approx([0.0, 1.5e-4 / 3, 1.5e-4 * 2 / 3])
    expected = [1e-5 + (1.5e-4 - 1e-5) * (1 + cos(pi * (step - 3) / 297)) / 2 for step in range(3, 300)]
    assert rates[3:] == pytest.approx(expected)


def test_learning_rate_of_bert(tmp_path: Path) -> None:
    """Catches another warm-up than 10,000 steps of 2 million, and a decay that is not linear to zero."""
    arguments = BERT_PRETRAINING.arguments(tmp_path, use_cpu=True)
    assert arguments.get_warmup_steps(arguments.max_steps) == 10_000
    arguments = BERT_PRETRAINING.arguments(tmp_path, use_cpu=True, max_steps=400)
    rates = _learning_rates(_trainer(arguments, MegatronBertForPreTraining(BERT_MODEL)), 400)
    assert rates[:3] == pytest.approx([0.0, 0.5e-4, 1e-4])
    assert rates[2:] == pytest.approx([1e-4 * (400 - step) / 398 for step in range(2, 400)])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (512, 1)),
        ({"data_parallel_size": 64}, (8, 1)),
        ({"data_parallel_size": 64, "micro_batch": 2}, (2, 4)),
        ({"batch": 24, "micro_batch": 4, "data_parallel_size": 2}, (4, 3)),
    ],
)
def test_batches(tmp_path: Path, sizes: dict[str, int], expected: tuple[int, int]) -> None:
    """Catches a batch that grows or shrinks with the number of processes."""
    arguments = GPT2_PRETRAINING.arguments(tmp_path, use_cpu=True, **sizes)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == expected


@pytest.mark.parametrize("sizes", [{"micro_batch": 3}, {"micro_batch": 0}, {"data_parallel_size": 1000}])
def test_batches_that_do_not_divide_are_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    """Catches a smaller or larger batch than the recipe's without a word."""
    with pytest.raises(PartitionError, match="a batch of 512 does not divide into micro-batches of"):
        GPT2_PRETRAINING.arguments(tmp_path, **sizes)


def test_table_6(tmp_path: Path) -> None:
    """Catches a number in the wrong row or column; spelt out by task, then by size."""
    table = {
        task: [
            (recipe.batch, recipe.settings["learning_rate"], recipe.settings["num_train_epochs"])
            for recipe in (finetuning_recipe(task, size) for size in ("336m", "1.3b", "3.9b"))
        ]
        for task in FINETUNING_TASKS
    }
    assert table == {
        "mnli": [(128, 1e-5, 10), (128, 1e-5, 10), (128, 1e-5, 10)],
        "qqp": [(128, 5e-5, 12), (128, 3e-5, 12), (256, 4e-5, 12)],
        "squad-1.1": [(64, 3e-5, 2), (48, 3e-5, 2), (48, 1e-5, 2)],
        "squad-2.0": [(48, 3e-5, 2), (64, 3e-5, 2), (48, 1e-5, 2)],
        "race": [(32, 2e-5, 3), (16, 1e-5, 3), (32, 2e-5, 3)],
    }
    arguments = finetuning_recipe("race").arguments(tmp_path, use_cpu=True, num_train_epochs=1)
    assert (arguments.num_train_epochs, arguments.weight_decay, arguments.lr_scheduler_type) == (1, 0.1, "linear")
    with pytest.raises(UnsupportedError, match=r"no fine-tuning of '340m' for 'race'; choose a task of mnli, "):
        finetuning_recipe("race", "340m")


def _scaled(tp_size: int) -> dict[str, torch.Tensor]:
    model = MegatronBertForPreTraining.from_config(BERT_MODEL, distributed_config=layout(tp_size), seed=3)
    scale_residual_outputs(model)
    return full_weights(model)


def test_initial_weights_of_bert(pool: Pool) -> None:
    """Catches residual outputs as large as the other matrices, smaller ones elsewhere, other weights by degree."""
    (weights,) = run_at(pool, 1, _scaled, 1)
    for name, value in weights.items():
        if value.dim() > 1 and value.numel() > 1000:
            is_output = name.endswith("output.dense.weight")
            std = 0.02 / sqrt(2 * 8) if is_output else 0.02
            assert value.std().item() == pytest.approx(std, rel=0.1), name
    assert sum(name.endswith("output.dense.weight") for name in weights) == 16
    for cut in run_at(pool, 2, _scaled, 2):
        assert_all_equal(cut, weights)


def test_initial_weights_of_gpt2_are_scaled_already() -> None:
    """Catches weights that are scaled twice."""
    model = MegatronGPT2LMHeadModel.from_config(GPT2_MODEL, seed=3)
    before = full_weights(model)
    scale_residual_outputs(model)
    assert_all_equal(full_weights(model), before)
