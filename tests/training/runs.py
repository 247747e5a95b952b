"""Training runs that the tests compare: tiny models, a fixed data set, one log entry per step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

import hf_megatron
from hf_megatron import MegatronTrainer
from hf_megatron.planning.run import RUN_FILE
from tests.models.reference import Pool, Tensors, full, full_weights, rank

_T = TypeVar("_T")

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tp_size": 2},
    "tp4": {"tp_size": 4},
    "tp2 x fsdp2": {"tp_size": 2, "fsdp_size": 2},
    "tp2 x replicate2": {"tp_size": 2, "dp_replicate_size": 2},
    "tp2, split sequences": {"tp_size": 2, "enable_sequence_parallel": True},
    "tp4, split sequences": {"tp_size": 4, "enable_sequence_parallel": True},
    "tp5": {"tp_size": 5},  # which divides neither 12 heads nor 48 columns
    "tp2 x fsdp2, split sequences": {"tp_size": 2, "fsdp_size": 2, "enable_sequence_parallel": True},
}


def layouts(chosen: str, *others: str) -> list[Any]:
    """Parameters of a test, ``"one"`` for one process: the chosen one is quick, the others, or all others, are slow."""
    names = others or tuple(name for name in LAYOUTS if name != chosen)
    return [chosen, *(pytest.param(name, marks=pytest.mark.slow) for name in names)]


# All layouts of the tests divide 8; 48 examples are whole batches at every one of them.
NUM_EXAMPLES, LENGTH, GLOBAL_BATCH = 48, 12, 8


@dataclass(frozen=True)
class Run:
    """What to train and how."""

    model: Path  # directory of the weights to begin with
    output: Path  # directory of the checkpoints
    model_class: str = "MegatronGPT2LMHeadModel"
    layout: dict[str, int] = field(default_factory=dict)  # of the DistributedConfig; empty for one plain process
    config: dict[str, Any] = field(default_factory=dict)  # changes to the configuration, dropout for example
    arguments: dict[str, Any] = field(default_factory=dict)  # changes to the TrainingArguments
    resume: Path | None = None  # checkpoint to resume from
    lora: dict[str, Any] | None = None  # arguments of the LoraConfig if an adapter is to be trained

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return prod(self.layout.values())


@dataclass(frozen=True)
class Step:
    """What Trainer logs of one step."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int


class Log(TrainerCallback):
    """Collects the steps."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            loss, norm, rate = (float(logs[name]) for name in ("loss", "grad_norm", "learning_rate"))
            self.steps.append(Step(state.global_step, loss, norm, rate, state.num_input_tokens_seen))


def examples(count: int = NUM_EXAMPLES, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Token ids and labels, of which about a fifth are -100, so that ranks have different numbers of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 131, (count, LENGTH), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, -100, ids)
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def make_trainer(run: Run, log: Log | None = None, **options: Any) -> MegatronTrainer:
    """The trainer of a run; accelerate's process-wide state of an earlier run in this process is forgotten."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    model_class = getattr(hf_megatron, run.model_class)
    config = model_class.config_class.from_pretrained(run.model)
    for name, value in run.config.items():
        setattr(config, name, value)
    layout = DistributedConfig(**run.layout) if run.layout else None
    model = model_class.from_pretrained(run.model, config=config, distributed_config=layout)
    if run.lora is not None:
        from peft import LoraConfig

        from hf_megatron.peft import get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**run.lora))
    batch = GLOBAL_BATCH * run.layout.get("tp_size", 1) // run.world_size
    defaults: dict[str, Any] = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 3}
    defaults |= {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-2, "max_grad_norm": 0.5, "seed": 7}
    # The key bias has gradient zero but for rounding, which Adam would blow up to steps of full size.
    defaults |= {"adam_epsilon": 1e-3, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    defaults |= {"logging_steps": 1, "logging_nan_inf_filter": False, "include_num_input_tokens_seen": "all"}
    arguments = TrainingArguments(str(run.output), **{**defaults, **run.arguments})
    callbacks = [] if log is None else [log]
    data = {"train_dataset": examples(), "eval_dataset": examples(11, seed=1)}
    return MegatronTrainer(model, arguments, callbacks=callbacks, **{**data, **options})


def train(run: Run, **options: Any) -> tuple[list[Step], Tensors]:
    """Train; returns the log and the full weights afterwards."""
    trainer, steps = _train(run, **options)
    return steps, full_weights(trainer.model)


def train_with_moments(run: Run) -> tuple[list[Step], Tensors]:
    """Train; returns the log, and the full weights and optimizer state afterwards."""
    trainer, steps = _train(run)
    state = full_weights(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        moments = trainer.optimizer.state[parameter].items()
        state |= {f"{kind} of {name}": full(value).clone() for kind, value in moments}
    return steps, state


def _train(run: Run, **options: Any) -> tuple[MegatronTrainer, list[Step]]:
    log = Log()
    trainer = make_trainer(run, log, **options)
    trainer.train(resume_from_checkpoint=None if run.resume is None else str(run.resume))
    return trainer, log.steps


def predict(run: Run) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """Predictions, labels and loss on 11 examples, which no batch size of the tests divides."""
    trainer = make_trainer(run)
    output = trainer.predict(examples(11, seed=1))
    return output.predictions, output.label_ids, output.metrics["test_loss"]


def names_in(directory: Path) -> list[str]:
    """What lies in a run's output directory, but for the record of the run."""
    return sorted(path.name for path in directory.iterdir() if path.name != RUN_FILE)


def spoil_a_gradient(trainer: Any, parameter: torch.Tensor, step: int, value: float) -> None:
    """Let one element of the last rank's part of a parameter's gradient be inf or nan in a step."""

    def spoil(parameter: torch.Tensor) -> None:
        gradient: Any = getattr(parameter.grad, "_local_tensor", parameter.grad)
        if trainer.state.global_step + 1 == step and rank() == trainer.args.world_size - 1:
            gradient.view(-1)[0] = value

    parameter.register_post_accumulate_grad_hook(spoil)


def on_ranks(pool: Pool, job: Callable[..., _T], run: Run, *arguments: Any, **options: Any) -> _T:
    """Rank 0's result of a job at the run's layout; without a layout it runs in this process."""
    if not run.layout:
        return job(run, *arguments, **options)
    return pool(run.world_size).run(job, run, *arguments, timeout=240, **options)[0]


def assert_same_steps(steps: list[Step], expected: list[Step], tolerance: float = 1e-5) -> None:
    for s, e in zip(steps, expected, strict=True):
        assert (s.step, s.tokens, s.learning_rate) == (e.step, e.tokens, e.learning_rate)
        assert (s.loss, s.grad_norm) == pytest.approx((e.loss, e.grad_norm), rel=tolerance), f"step {s.step}"


def assert_close(actual: Tensors, expected: Tensors) -> None:
    """The same names, and values but for what steps make of rounding."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-4, atol=1e-5), name
