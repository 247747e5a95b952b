"""Half precision: bfloat16, and float16 with a loss scale that all ranks share."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron.errors import DivergenceError
from tests.models.reference import Pool, assert_replicas_equal, full_weights
from tests.tiers import cases
from tests.training.runs import (
    LAYOUTS,
    Log,
    Run,
    Step,
    assert_same_steps,
    layouts,
    make_trainer,
    on_ranks,
    spoil_a_gradient,
    train,
)

LORA = {"r": 4, "target_modules": ["c_attn", "c_proj"]}


def _scaled(run: Run, log: Log | None = None, scale: float = 2.0**16) -> Any:
    """A trainer in float16, which accelerate offers on accelerators only."""
    trainer = make_trainer(run, log)
    accelerator = trainer.accelerator
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def _train_with_overflow(run: Run, step: int) -> tuple[list[Step], float, dict[str, torch.Tensor]]:
    """Train; in one step an element of the last rank's part of a cut parameter's gradient is inf."""
    log = Log()
    trainer = _scaled(run, log)
    suffix = "c_attn.lora_B.default.weight" if run.lora else "c_attn.weight"
    parameter = next(p for name, p in trainer.model.named_parameters() if name.endswith(suffix))
    spoil_a_gradient(trainer, parameter, step, torch.inf)
    trainer.train()
    assert_replicas_equal(trainer.model)
    return log.steps, trainer.accelerator.scaler.get_scale(), full_weights(trainer.model)


@cases("lora, optimizer", product((LORA, None), ("adamw_torch_fused", "adamw_torch")), [(LORA, "adamw_torch_fused")])
def test_an_overflow_on_one_rank_is_skipped_by_all(
    pool: Pool, gpt2: Path, tmp_path: Path, lora: dict[str, Any] | None, optimizer: str
) -> None:
    """Catches ranks of which one skips the step and the others take it, so that replicas part for good."""
    arguments = {"save_strategy": "no", "optim": optimizer}
    run = Run(gpt2, tmp_path, layout=LAYOUTS["tp2"], lora=lora, arguments=arguments)
    steps, scale, weights = on_ranks(pool, _train_with_overflow, run, 3)
    expected, expected_scale, expected_weights = _train_with_overflow(replace(run, layout={}), 3)
    assert scale == expected_scale == 2.0**15
    assert steps[2].grad_norm == torch.inf
    assert_same_steps(steps, expected, 1e-3)  # float16 has 11 bits
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=2e-3)


def test_a_scale_that_shrinks_to_nothing_ends_the_run(gpt2: Path, tmp_path: Path) -> None:
    """Catches a run that skips every step until the end, and says that it is done."""
    trainer = _scaled(Run(gpt2, tmp_path, arguments={"save_strategy": "no"}), scale=2.0**-12)
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(DivergenceError, match=r"^step 3: the norm of the gradients is .*no scale will do"):
        trainer.train()


def _resume_scale(run: Run) -> float:
    trainer = _scaled(run)
    trainer.train(resume_from_checkpoint=str(run.resume))
    scale: float = trainer.accelerator.scaler.get_scale()
    return scale


def test_the_loss_scale_is_resumed(pool: Pool, gpt2: Path, tmp_path: Path) -> None:
    """Catches a scale that starts over, and with it a row of skipped steps."""
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS["tp2"], arguments={"max_steps": 4})
    on_ranks(pool, _train_with_overflow, run, 2)
    again = replace(run, output=tmp_path / "again", resume=run.output / "checkpoint-3")
    assert on_ranks(pool, _resume_scale, again) == 2.0**15


@pytest.mark.parametrize("layout", layouts("tp2", "tp2 x fsdp2"))
def test_bfloat16_trains_alike_at_every_layout(pool: Pool, gpt2: Path, tmp_path: Path, layout: str) -> None:
    """Catches a loss or sums that are rounded to bfloat16 under tensor parallelism."""
    run = Run(gpt2, tmp_path, arguments={"save_strategy": "no", "bf16": True, "max_steps": 4})
    expected, _ = train(run)
    steps, _ = on_ranks(pool, train, replace(run, layout=LAYOUTS[layout]))
    assert_same_steps(steps, expected, 1e-2)  # bfloat16 has 8 bits
