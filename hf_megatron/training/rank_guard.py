"""Detect diverging ranks of a tensor-parallel group during training.

The ranks of a group must read the same batches, draw the same random numbers, hold the same replicated parameters and
take the same decisions. If they do not, no error occurs by itself: the losses stay plausible while the weights become
wrong, or a rank waits forever for one that took another path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout, _world
from transformers.trainer_utils import SaveStrategy, has_length
from transformers.utils import logging

from hf_megatron.tensor_parallel.agreement import RankComparison
from hf_megatron.training.progress import WatchedTrainer
from hf_megatron.training.stop_signals import StopSignals

logger = logging.get_logger(__name__)

_CONTROL = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
_STOP = 1 << len(_CONTROL)


class GuardedTrainer(WatchedTrainer):
    """Trainer whose tensor-parallel ranks compare what must be equal.

    The comparison runs in the first step of every data set, every ``rank_check_steps`` steps, before every checkpoint
    and when training ends. If a callback requests a stop or a checkpoint on one rank, all ranks of its group follow.
    After a signal to any rank, all save a checkpoint and exit.
    """

    rank_check_steps: int = 100
    _signals: StopSignals | None = None
    _is_stopping = False  # whether a rank of the group has received a signal; where it counts, whether any has
    _gloo: dist.ProcessGroup | None = None  # all processes
    _comparison: RankComparison | None = None
    _checked_step: int | None = None  # the last step before which a training batch was compared
    _is_evaluation_unchecked = False

    @property
    def _ranks(self) -> RankComparison | None:
        if self._comparison is None and self.get_tp_size() > 1 and self.rank_check_steps:
            mesh = self.accelerator.torch_device_mesh
            self._comparison = RankComparison.on_cpu(mesh["tp"].get_group())
        return self._comparison

    def _agree(self, place: str, facts: Mapping[str, Any], wishes: int = 0) -> int:
        return wishes if self._ranks is None else self._ranks.agree(place, facts, wishes)

    def _compare(self, place: str, batch: Any = None) -> None:
        if self._ranks is not None:
            self._ranks.compare(f"{place} step {self.state.global_step}", self.model, batch)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._limit_waiting()
        self._checked_step = None
        self._signals, self._is_stopping = None, False
        if self._gloo is None and dist.is_initialized():
            self._gloo = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        if self.args.save_strategy == SaveStrategy.NO:
            output = super().train(*args, **kwargs)
        else:
            with StopSignals() as self._signals:
                output = super().train(*args, **kwargs)
        self._compare("the end of training, after")
        return output

    def _limit_waiting(self) -> None:
        """Give up on a rank that does not come to a collective after ``args.ddp_timeout`` seconds."""
        # TrainingArguments comes too late for it where the model was loaded first, and transformers waits for two
        # hours; no argument reaches the groups of a mesh.
        if self.is_distributed_loading_by_transformers:
            for group in _world.pg_map:
                _set_pg_timeout(self.args.ddp_timeout_delta, group)

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, *args: Any, **kwargs: Any) -> Any:
        facts = {"number of steps": max_steps, "number of steps in an epoch": steps_per_epoch}
        self._agree("the start of training", facts)
        return super()._init_training_state(max_steps, steps_per_epoch, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Called right after reading. The collective that follows is skipped by a rank without a batch.
        if not has_length(self.train_dataset):
            facts = {"number of batches": len(batch_samples)}
            self._agree(f"reading for step {self.state.global_step + 1}", facts)
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step
        is_due = bool(self.rank_check_steps) and step % self.rank_check_steps == 0
        if self._checked_step is None or (is_due and step != self._checked_step):
            self._checked_step = step
            self._compare("before the step after", inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._share_control("after a step")
        if self._any_is_stopping():
            self.control.should_save = True
            self.control.should_evaluate = False
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            logger.warning(f"A signal has stopped the run after step {self.state.global_step}; a checkpoint is saved.")
            raise SystemExit(0)
        does_anything = self.control.should_log or self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if does_anything:
            self._share_control("after logging, evaluating and saving")

    def _any_is_stopping(self) -> bool:
        """Whether any rank has received a signal.

        Collective: all-reduce over all processes of a number, unless they are one tensor-parallel group.
        """
        is_agreed = self._ranks is not None and self.get_tp_size() == self.args.world_size
        if self._signals is not None and dist.is_initialized() and not is_agreed:
            flag = torch.tensor(int(self._is_stopping))
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._gloo)
            self._is_stopping = bool(flag)
        return self._is_stopping

    def _share_control(self, place: str) -> None:
        wishes = sum(getattr(self.control, name) << bit for bit, name in enumerate(_CONTROL))
        if self._is_stopping or (self._signals is not None and self._signals.received is not None):
            wishes |= _STOP
        wishes = self._agree(f"{place} {self.state.global_step}", {}, wishes)
        for bit, name in enumerate(_CONTROL):
            setattr(self.control, name, bool(wishes >> bit & 1))
        self._is_stopping = bool(wishes & _STOP)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        if has_length(dataloader):
            self._agree(f"the start of {description}", {"number of batches": len(dataloader)})
        self._is_evaluation_unchecked = True
        return super().evaluation_loop(dataloader, description, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_evaluation_unchecked:
            self._is_evaluation_unchecked = False
            self._compare("the first batch of an evaluation after", inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)
