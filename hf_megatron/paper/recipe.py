"""The paper's training recipes, as arguments for :class:`MegatronTrainer`.

    recipe = GPT2_PRETRAINING                       # or BERT_PRETRAINING, or finetuning_recipe("squad-1.1", "336m")
    arguments = recipe.arguments("output", data_parallel_size=64, micro_batch=8, fp16=True)

All of them: AdamW, weight decay on matrices only (Trainer's way: no biases, no norms), clipping at 1.0, activation
checkpointing after every layer, a linear warm-up. The caller chooses the precision: ``fp16=True`` scales the loss
dynamically, as in the paper; ``bf16=True`` needs no scaling.

Source: Shoeybi et al. 2019, arXiv:1909.08053, sections 4.2 and 5 and table 6. What the paper leaves open: Adam's
moments are Megatron-LM's defaults, fine-tuning's weight decay and warm-up those of Liu et al. 2019, arXiv:1907.11692,
table 10.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from hf_megatron.errors import PartitionError, UnsupportedError

_COMMON: Mapping[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "activation_checkpointing": True,
}


@dataclass(frozen=True)
class Recipe:
    """How one of the paper's models is trained."""

    batch: int  # sequences of a step, all ranks together
    settings: Mapping[str, Any]  # the TrainingArguments that the recipe gives a value to

    def arguments(
        self,
        output_dir: str | Path,
        *,
        batch: int | None = None,
        data_parallel_size: int = 1,
        micro_batch: int | None = None,
        **changes: Any,
    ) -> TrainingArguments:
        """The recipe for a machine; PartitionError if the batch does not divide into micro-batches.

        ``batch`` is the sequences of a step, ``data_parallel_size`` the number of processes divided by the
        tensor-parallel degree, ``micro_batch`` the sequences a tensor-parallel group computes at a time, by default its
        whole share of the batch. ``changes`` are ``TrainingArguments`` to set or to change; the warm-up is a share of
        the steps.
        """
        batch = self.batch if batch is None else batch
        micro_batch = max(1, batch // data_parallel_size) if micro_batch is None else micro_batch
        at_a_time = micro_batch * data_parallel_size
        if batch < 1 or at_a_time < 1 or batch % at_a_time:
            raise PartitionError(
                f"a batch of {batch} does not divide into micro-batches of {micro_batch} on {data_parallel_size} "
                f"data-parallel ranks; choose a batch that {at_a_time} divides."
            )
        settings = {
            **_COMMON,
            **self.settings,
            "per_device_train_batch_size": micro_batch,
            "per_device_eval_batch_size": micro_batch,
            "gradient_accumulation_steps": batch // at_a_time,
            **changes,
        }
        return TrainingArguments(str(output_dir), **settings)


# Section 4.2: 1024 tokens each, 3,000 iterations of warm-up. As in Megatron-LM the cosine goes down to the minimum; the
# paper's words would also allow one that goes to zero and is stopped there.
GPT2_PRETRAINING = Recipe(
    batch=512,
    settings={
        "learning_rate": 1.5e-4,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-5},
        "warmup_steps": 0.01,
        "max_steps": 300_000,
    },
)

# Section 4.2: 2 million iterations, 10,000 of them warm-up (the 3.9B model: 1.5 million).
BERT_PRETRAINING = Recipe(
    batch=1024,
    settings={"learning_rate": 1e-4, "lr_scheduler_type": "linear", "warmup_steps": 0.005, "max_steps": 2_000_000},
)

# Table 6: for each task, by model size, (batch size, learning rate), and the epochs; 3.9B is called 3.8B there.
_SIZES = ("336m", "1.3b", "3.9b")
_TABLE_6: Mapping[str, tuple[tuple[tuple[int, float], ...], int]] = {
    "mnli": (((128, 1e-5), (128, 1e-5), (128, 1e-5)), 10),
    "qqp": (((128, 5e-5), (128, 3e-5), (256, 4e-5)), 12),
    "squad-1.1": (((64, 3e-5), (48, 3e-5), (48, 1e-5)), 2),
    "squad-2.0": (((48, 3e-5), (64, 3e-5), (48, 1e-5)), 2),
    "race": (((32, 2e-5), (16, 1e-5), (32, 2e-5)), 3),
}
FINETUNING_TASKS = tuple(_TABLE_6)


def finetuning_recipe(task: str, size: str = "336m") -> Recipe:
    """Table 6's row for one of ``FINETUNING_TASKS`` and ``336m``, ``1.3b`` or ``3.9b``; UnsupportedError for others."""
    if task not in _TABLE_6 or size not in _SIZES:
        raise UnsupportedError(
            f"the paper has no fine-tuning of {size!r} for {task!r}; choose a task of {', '.join(_TABLE_6)} and a size "
            f"of {', '.join(_SIZES)}."
        )
    rows, epochs = _TABLE_6[task]
    batch, learning_rate = rows[_SIZES.index(size)]
    settings = {
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,
        "num_train_epochs": epochs,
        "weight_decay": 0.01 if task.startswith("squad") else 0.1,
    }
    return Recipe(batch, settings)


_BERT_RESIDUAL_OUTPUT = re.compile(r"encoder\.layer\.\d+\.(attention\.)?output\.dense\.weight$")


@torch.no_grad()
def scale_residual_outputs(model: PreTrainedModel) -> None:
    """Scale the fresh weights of a BERT's residual outputs by 1/sqrt(2 x layers), in place, as the paper draws them.

    These are the last matrices of attention and MLP in each layer, which stock BERT draws like all others. GPT-2 draws
    them so already and is left as it is. Call it once, on a model fresh from ``from_config``, at any layout.
    """
    for name, parameter in model.named_parameters():
        if _BERT_RESIDUAL_OUTPUT.search(name):
            parameter.mul_(1 / sqrt(2 * model.config.num_hidden_layers))
