"""Steps and clipping on shards, and steps whose numbers are read late."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from hf_megatron import MegatronTrainer
from hf_megatron.errors import DivergenceError
from hf_megatron.training.local_step import clip_grad_norm_, step_on_shards
from tests.models.architectures import GPT2
from tests.models.reference import Pool, full, full_weights
from tests.training.runs import LAYOUTS, Log, Run, make_trainer, on_ranks, spoil_a_gradient

OPTIMIZERS: dict[str, Any] = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD, plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


def _steps(directory: Path, name: str, is_local: bool) -> dict[str, torch.Tensor]:
    """Three steps, of which the last is of another optimizer, that was loaded; weights and state afterwards."""
    model = GPT2.load(directory, 2, "LMHeadModel").train()
    make = step_on_shards if is_local else (lambda optimizer: optimizer)
    optimizer = make(OPTIMIZERS[name](model.parameters()))
    for step in range(3):
        if step == 2:
            first, optimizer = optimizer, make(OPTIMIZERS[name](model.parameters()))
            optimizer.load_state_dict(first.state_dict())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5)
        model(**GPT2.batch("LMHeadModel")).loss.backward()
        parameter = model.transformer.h[0].attn.c_attn.weight
        parameter.grad = None if step == 0 else parameter.grad  # begins late
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    found = full_weights(model)
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                assert isinstance(value, DTensor) == (value.dim() > 0)
                found[f"{kind} of {name}"] = full(value).clone()
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_on_shards_equal_those_on_dtensors(pool: Pool, gpt2: Path, name: str) -> None:
    """Catches state that a loaded optimizer does not see, that is lost after a step, or whose shards are mixed up."""
    local, plain = (pool(2).run(_steps, gpt2, name, is_local)[0] for is_local in (True, False))
    assert local.keys() == plain.keys()
    for key, value in plain.items():
        assert torch.equal(local[key], value), key


def _clip(directory: Path, sizes: tuple[int, int], max_norm: float) -> tuple[float, float, float]:
    """Torch's norm and ours, and how far what they leave differs."""
    model = GPT2.load(directory, sizes[0], fsdp_size=sizes[1], dtype=torch.float64).train()
    model(**GPT2.batch("LMHeadModel")).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = clip_grad_norm_(model.parameters(), max_norm)
    clipped = {name: full(p.grad) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name]
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    difference = max(float((full(p.grad) - clipped[name]).abs().max()) for name, p in model.named_parameters())
    return float(full(expected)), float(norm), difference


@pytest.mark.parametrize("max_norm", [1e-3, 1e6, float("inf")])
@pytest.mark.parametrize("sizes", [(2, 1), (2, 2), (4, 1)])
def test_clipping_equals_that_of_torch(pool: Pool, gpt2: Path, sizes: tuple[int, int], max_norm: float) -> None:
    """Catches replicated gradients that count on each rank, shards that count on none, and a scale per rank."""
    found = pool(sizes[0] * sizes[1]).run(_clip, gpt2, sizes, max_norm)
    for expected, norm, difference in found:
        assert norm == pytest.approx(expected, rel=1e-12)
        assert difference <= 1e-15


def _diverge(run: Run) -> tuple[str, bool, int]:
    trainer = make_trainer(run)
    _name, parameter = next(iter(trainer.model.named_parameters()))
    spoil_a_gradient(trainer, parameter, 3, float("nan"))
    weights: list[dict[str, torch.Tensor]] = []
    original = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        weights.append(full_weights(trainer.model))
        return original(*args, **kwargs)

    trainer.training_step = training_step  # type: ignore[method-assign]
    late = mock.patch.object(MegatronTrainer, "_is_ahead", True)  # as on a GPU
    with late, pytest.raises(DivergenceError) as caught:
        trainer.train()
    after = full_weights(trainer.model)
    is_kept = all(torch.equal(value, after[name]) for name, value in weights[2].items())
    return str(caught.value), is_kept, len(weights)


@pytest.mark.parametrize("name", ["one", "tp2"])
@pytest.mark.parametrize(("changes", "num_steps"), [({"logging_steps": 50, "save_steps": 50}, 4), ({}, 3)])
def test_numbers_that_are_read_late(
    pool: Pool, gpt2: Path, tmp_path: Path, name: str, changes: dict[str, Any], num_steps: int
) -> None:
    """Catches weights that become nan before anybody looks, steps after that, and checkpoints of such a step."""
    run = Run(
        gpt2,
        tmp_path,
        layout=LAYOUTS.get(name, {}),
        arguments={"optim": "adamw_torch_fused", **changes},
    )
    message, is_kept, steps = on_ranks(pool, _diverge, run)
    assert message.startswith("step 3: the norm of the gradients is nan")
    assert is_kept
    assert steps == num_steps
    assert not (tmp_path / "checkpoint-3").exists()


def _logged(run: Run, is_ahead: bool) -> tuple[list[float], bool]:
    """The losses that are logged, where that of the second step is nan; and whether the filter is on afterwards."""
    log = Log()
    trainer = make_trainer(run, log)
    original, calls = trainer.compute_loss, itertools.count(1)

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        # nan without a gradient, so that the step itself is an ordinary one.
        return loss + torch.tensor(float("nan")) if next(calls) == 2 else loss

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    with mock.patch.object(MegatronTrainer, "_is_ahead", is_ahead):
        trainer.train()
    return [step.loss for step in log.steps], trainer.args.logging_nan_inf_filter


def test_losses_that_are_not_finite_are_left_out_of_the_log(gpt2: Path, tmp_path: Path) -> None:
    """Catches a filter that works on one kind of device only, and one that stays off for the next run."""
    arguments = {"optim": "adamw_torch_fused", "logging_nan_inf_filter": True, "max_steps": 4, "logging_steps": 2}
    ahead, stock = (
        _logged(Run(gpt2, tmp_path / str(is_ahead), arguments=arguments), is_ahead) for is_ahead in (True, False)
    )
    assert ahead == stock
    assert ahead[1] is True
    assert all(loss == loss for loss in ahead[0])
