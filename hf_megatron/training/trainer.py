"""``MegatronTrainer``: transformers' Trainer for tensor-parallel models, on CPUs and GPUs.

It adds the following to the stock class, which rejects or miscounts each of them for models sharded while loading:

- tensor parallelism on CPUs
- checkpoints with optimizer state that resume at the same or another layout
- metrics and predictions with every example once, and token counts with every token once
- iterable data sets with the same order at every layout, and resuming at the right position
- label smoothing and the mean over predicted tokens in the model's vocabulary-parallel loss
- float16 overflow detection across ranks, and an error before inf or nan reaches the weights
- detection of diverging ranks (``rank_guard``)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from torch.utils.data import IterableDataset
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint, has_length
from transformers.utils import logging

from hf_megatron.errors import CheckpointError, DivergenceError, UnsupportedError
from hf_megatron.tensor_parallel import non_finite_names
from hf_megatron.training.checkpoints import CheckpointingTrainer, inner_optimizer, is_of_a_peer
from hf_megatron.training.local_step import clip_grad_norm_, step_on_shards
from hf_megatron.training.loss_scale import SharedGradScaler
from hf_megatron.training.starting import newest_intact_checkpoint, require_shared_directory
from hf_megatron.training.step_numbers import Numbers, can_skip, skip_if_not_finite
from hf_megatron.training.streams import Stream, place_in_stream
from hf_megatron.training.training_arguments import (
    AnyDeviceParallelismConfig,
    check_layout,
    check_processes,
    tp_size_of,
)
from hf_megatron.training.training_state import last_usable_checkpoint, tidy_checkpoints, verify_checkpoint

logger = logging.get_logger(__name__)

# If gradients overflow even at this scale, they are too large or non-finite at any scale.
_SMALLEST_LOSS_SCALE = 1e-4


class MegatronTrainer(CheckpointingTrainer):
    """A drop-in :class:`transformers.Trainer` for one process, TP, TP x FSDP2 and TP x replicated data parallelism.

    The layout is that of the model: the ``DistributedConfig`` with which it was loaded or built. Arguments, callbacks
    and outputs are those of the stock class. With a stock model, only the form of checkpoints differs
    (``training_state``).

    Two arguments are new. ``rank_check_steps`` is the interval, in steps, at which the ranks of a tensor-parallel group
    compare batch, random state and replicated parameters, in addition to the first step of every data set, every
    checkpoint and the end of training. 0 disables all of these checks. With ``background_saving``, training stops only
    until its state is copied in memory, and a thread writes the checkpoint; those of adapters and of stock models, and
    those that are uploaded, are still written at once.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *pargs: Any,
        rank_check_steps: int = 100,
        background_saving: bool = False,
        **kwargs: Any,
    ) -> None:
        check_processes(args)
        self.rank_check_steps = rank_check_steps
        self.background_saving = background_saving
        # The stock class rejects saving the optimizer of a model that was sharded while loading; this one can save it.
        saves_all = args is not None and not args.save_only_model
        if saves_all:
            args.save_only_model = True
        try:
            super().__init__(model, args, *pargs, **kwargs)
        finally:
            if saves_all:
                args.save_only_model = False
        check_layout(
            self.args,
            self.model,
            has_model_init=self.model_init is not None,
            has_optimizer=self.optimizer is not None or self.optimizer_cls_and_kwargs is not None,
        )
        if self._has_own_loss:
            # The stock smoother needs full logits, which do not exist in training; compute_loss passes the factor on.
            self.label_smoother = None
        self._loss_of_step: torch.Tensor | float = 0.0
        self._pending: Numbers | None = None
        self._filters_losses = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Same as the stock method; errors include the step, the rank and the checkpoint to resume from.

        ``resume_from_checkpoint="auto"`` resumes from the newest checkpoint in ``output_dir`` that is not damaged, and
        is a fresh start if there is none. After SIGTERM or SIGUSR1 to any rank, all ranks finish the step, save a
        checkpoint and exit with status 0 (``SystemExit``), unless ``save_strategy="no"``.

        Raises:
            CheckpointError: The checkpoint to resume from is damaged, or one could not be written; or ``output_dir`` is
                not the same directory for all ranks.
            DivergenceError: The gradients of a step are inf or nan. The step was not taken.
            RanksDifferError: The ranks of a tensor-parallel group are no longer in step.
        """
        scaler = self.accelerator.scaler
        if scaler is not None and self.is_distributed_loading_by_transformers:
            self.accelerator.scaler = SharedGradScaler(self.accelerator.device.type, scaler)
        output = Path(self.args.output_dir)
        if self.args.save_strategy != SaveStrategy.NO:
            require_shared_directory(output)
        tidy_checkpoints(output, is_first=self.is_world_process_zero())
        is_verified = resume_from_checkpoint == "auto"
        if is_verified:
            last = newest_intact_checkpoint(output)
            resume_from_checkpoint = None if last is None else str(last)
            if self.is_world_process_zero():
                logger.warning(f"{output}: {'a fresh start' if last is None else f'going on from {last.name}'}.")
        elif resume_from_checkpoint is True and output.is_dir():
            # If there is no checkpoint, the stock method raises an error.
            resume_from_checkpoint = get_last_checkpoint(str(output)) or True
        resumed = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, (str, Path)) else None
        # The stock filter reads each loss back from the device; see `training_step`.
        self._filters_losses = self.args.logging_nan_inf_filter and self._is_ahead
        self.args.logging_nan_inf_filter &= not self._filters_losses
        try:
            if resumed is not None and not is_verified:
                verify_checkpoint(resumed)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            is_of_resuming = isinstance(error, CheckpointError) and resumed is not None and str(resumed) in str(error)
            error.add_note(self._circumstances(error, resumed if is_of_resuming else None))
            raise
        finally:
            self.args.logging_nan_inf_filter |= self._filters_losses
            self._pending, self._filters_losses = None, False

    def _circumstances(self, error: Exception, unusable: Path | None) -> str:
        place = f"On rank {self.args.process_index} of {self.args.world_size}, in step {self.state.global_step + 1}."
        if is_of_a_peer(error):
            place += (
                " A collective failed, because another rank ended or does not come: the first error in the log, or the "
                "launcher's root cause, tells why."
            )
        output = self.args.output_dir
        last = last_usable_checkpoint(Path(output), unusable)
        if last is None:
            return f"{place} There is no {'other ' if unusable else ''}checkpoint to resume from."
        how = "True" if get_last_checkpoint(output) == str(last) else repr(str(last))
        return f"{place} The last complete checkpoint is {last}; train(resume_from_checkpoint={how}) goes on from it."

    @property
    def _has_own_loss(self) -> bool:
        model = self._own_model
        return model is not None and model.has_vocab_parallel_loss

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator for the model's layout, on any device."""
        tp_size = tp_size_of(self.model)
        given = self.args.parallelism_config
        if tp_size > 1 and given is None:
            dp_size = self.model.config.distributed_config.dp_size
            self.args.parallelism_config = AnyDeviceParallelismConfig(tp_size=tp_size, dp_shard_size=dp_size)
        try:
            super().create_accelerator_and_postprocess()
        finally:
            self.args.parallelism_config = given
        if tp_size > 1:
            self.accelerator.gather_for_metrics = self._gather_for_metrics
            self.gather_function = self._gather_for_metrics
            if self.accelerator.dispatch_batches:
                raise UnsupportedError("dispatch_batches=True is not supported with tensor parallelism; leave it None.")
            self.accelerator.dataloader_config.dispatch_batches = False

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        if isinstance(dataset, IterableDataset) and self._own_model is not None:
            dataset = Stream(dataset)
            if not is_training and 1 < self.get_tp_size() < self.args.world_size:
                # The groups pad their last batch; the length is needed to remove the padding from the results.
                dataset = list(dataset)
        return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler) and self._own_model is not None:
            # Group by the global batch, so that the order is the same at every layout.
            sampler.batch_size *= self.args.world_size // self.get_tp_size()
        return sampler

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        if checkpoint is not None and not has_length(self.train_dataset) and not self.args.ignore_data_skip:
            epochs, steps = place_in_stream(Path(checkpoint))
            batches = steps * self.args.gradient_accumulation_steps
        return epochs, batches

    def _gather_for_metrics(self, data: Any, use_gather_object: bool = False) -> Any:
        """Gather every example once: the ranks of a tensor-parallel group hold the same ones.

        Like accelerate's method, it drops the examples that pad the last batch.
        """
        if use_gather_object:
            raise UnsupportedError("eval_use_gather_object=True is not supported under tensor parallelism.")
        gathered = recursively_apply(self._first_of_each_group, self.accelerator.gather(data))
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:
            gathered = recursively_apply(lambda tensor: tensor[: state.remainder], gathered)
        return gathered

    def _first_of_each_group(self, gathered: torch.Tensor) -> torch.Tensor:
        """Of [world x n, ...], the rows of each tensor-parallel group's first rank."""
        parts = gathered.chunk(self.accelerator.num_processes) if gathered.shape[0] else (gathered,)
        return torch.cat(parts[:: self.get_tp_size()])

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        # The stock method sums over all processes, but the ranks of a group see the same tokens.
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.get_tp_size()

    def floating_point_ops(self, inputs: Any) -> int:
        # The sum over all processes counts each group several times, each time for the whole model.
        return int(super().floating_point_ops(inputs) // self.get_tp_size())

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Same as the stock method, with label smoothing inside the model's loss if that is vocabulary-parallel."""
        if self.args.label_smoothing_factor and self._has_own_loss:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._loss_of_step = self._loss_of_step + loss
        if self._filters_losses:
            average = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
            loss = torch.where(torch.isfinite(loss), loss, average)
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Same as the stock method; the optimizer steps on this rank's shards, see :func:`step_on_shards`."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        return optimizer if self._own_model is None else step_on_shards(optimizer)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._own_model is None:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called by Trainer just before the optimizer step.
        if grad_norm is None and self._own_model is not None:
            self.accelerator.unscale_gradients()
            grad_norm = clip_grad_norm_(model.parameters(), float("inf"))
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, self._loss_of_step = torch.as_tensor(self._loss_of_step), 0.0
        self._check_pending()
        numbers = Numbers(self.state.global_step + 1, norm, loss)
        if self._defers_checks:
            skip_if_not_finite(inner_optimizer(self.optimizer), norm)
            self._pending = numbers
        else:
            self._check(numbers)
        return norm

    @property
    def _is_ahead(self) -> bool:
        """Whether the host launches what the device computes later, and would wait to read anything back."""
        return bool(self.args.device.type != "cpu")

    @property
    def _defers_checks(self) -> bool:
        """Whether a step's numbers are read only after the next one's forward and backward pass are under way.

        Meanwhile the device itself skips the step if they are not finite, which takes a fused optimizer.
        """
        return self._is_ahead and self.accelerator.scaler is None and can_skip(inner_optimizer(self.optimizer))

    def _check_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._check(pending)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self._check_pending()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._check_pending()
        super()._save_checkpoint(*args, **kwargs)

    def _check(self, numbers_of_step: Numbers) -> None:
        """Warn about a non-finite loss, and raise before non-finite gradients reach the weights."""
        step, (norm, loss), scaler = numbers_of_step.step, numbers_of_step.read(), self.accelerator.scaler
        numbers = f"the norm of the gradients is {norm}, the loss {loss} on rank {self.args.process_index}"
        if math.isfinite(norm):
            if not math.isfinite(loss):
                logger.warning(f"Step {step}: {numbers}. Is there a batch without any label?")
        elif scaler is None:
            advice = "Look at the batch of that step; lower the learning rate, or lengthen the warm-up."
            if broken := non_finite_names(self.model):
                advice = f"These weights are inf or nan, and were before the step: {', '.join(broken[:10])}."
            raise DivergenceError(
                f"step {step}: {numbers}. The step was not taken, so that the weights are those after step {step - 1}. "
                f"{advice}"
            )
        elif scaler.get_scale() < _SMALLEST_LOSS_SCALE:
            raise DivergenceError(
                f"step {step}: {numbers}, at a loss scale of {scaler.get_scale():g}: no scale will do. Lower the "
                "learning rate, or train in bfloat16."
            )
        elif self.is_world_process_zero():
            scale = scaler.get_scale()
            logger.warning(f"Step {step}: the gradients overflow at a loss scale of {scale:g}; skipped, to scale less.")
