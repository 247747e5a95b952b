"""MegatronTrainer trains adapters: the same steps at every layout, and checkpoints that hold the adapter alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GPT2LMHeadModel

from hf_megatron.peft import load_adapter
from tests.models.architectures import GPT2
from tests.models.reference import Pool, assert_all_equal
from tests.peft.adapters import GPT2_TARGETS, quiet_peft, trainable_weights
from tests.training.runs import (
    DROPOUT,
    LAYOUTS,
    Run,
    assert_close,
    assert_same_steps,
    layouts,
    make_trainer,
    on_ranks,
    train,
)

LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 16,
    "target_modules": list(GPT2_TARGETS),
    "lora_dropout": 0.1,
    "task_type": "CAUSAL_LM",
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GPT2.save_stock(tmp_path_factory.mktemp("gpt2"), num_hidden_layers=1)


@pytest.mark.parametrize("layout", layouts("tp2 x fsdp2", "tp2", "tp2 x replicate2"))
def test_every_layout_takes_the_same_steps(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches adapters that a layout trains otherwise; under tensor parallelism alone with dropout on."""
    dropout: dict[str, Any] = (
        {"config": DROPOUT, "lora": LORA} if "x" not in layout else {"lora": {**LORA, "lora_dropout": 0.0}}
    )
    run = Run(gpt2, tmp_path / "one", arguments={"label_smoothing_factor": 0.1}, **dropout)
    expected, weights = train(run)
    cut = replace(run, output=tmp_path / "cut", layout=LAYOUTS[layout])
    steps, cut_weights = on_ranks(pool, train, cut)
    assert_same_steps(steps, expected)
    assert_close(cut_weights, weights)


@pytest.mark.parametrize("second", layouts("tp2", "one", "tp2 x fsdp2"))
def test_checkpoints_hold_the_adapter_and_resume(pool: Pool, gpt2: Path, tmp_path: Path, second: str) -> None:
    """Catches the base model in every checkpoint, an adapter that is not loaded, or another optimizer's state."""
    same = second == "tp2"
    lora = LORA if same else {**LORA, "lora_dropout": 0.0}
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS["tp2"], config=DROPOUT if same else {}, lora=lora)
    steps, weights = on_ranks(pool, train, run)
    checkpoint = run.output / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not list(checkpoint.glob("*model-0*")), "the base model"
    again = replace(run, output=tmp_path / "again", layout=LAYOUTS.get(second, {}), resume=checkpoint)
    resumed_steps, resumed_weights = on_ranks(pool, train, again)
    if same:
        assert resumed_steps == steps[3:]
    else:
        assert_same_steps(resumed_steps, steps[3:])
    (assert_all_equal if same else assert_close)(resumed_weights, weights)


def _train_for_the_best(run: Run) -> tuple[str, dict[str, torch.Tensor]]:
    trainer = make_trainer(run)
    trainer.train()
    trainer.save_model(str(run.output / "final"))
    return str(trainer.state.best_model_checkpoint), trainable_weights(trainer.model)


def test_the_best_adapter_is_loaded_at_the_end(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches the last step's adapter where the best was asked for, and a final one that stock peft cannot load."""
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # of the loss: so the first one is the best
    }
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS["tp2"], lora=LORA, arguments=arguments)
    best, weights = on_ranks(pool, _train_for_the_best, run)
    assert Path(best).name == "checkpoint-2"
    base = make_trainer(replace(run, layout={}, lora=None)).model
    assert_all_equal(trainable_weights(load_adapter(base, best, is_trainable=True)), weights)
    with quiet_peft():
        stock = PeftModel.from_pretrained(
            GPT2LMHeadModel.from_pretrained(gpt2), run.output / "final", is_trainable=True
        )
    assert_all_equal(trainable_weights(stock), weights)
