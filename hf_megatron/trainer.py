"""``MegatronTrainer``: transformers' Trainer for models that are cut over ranks, on CPUs and GPUs.

What it adds to the stock class, which refuses or miscounts each of these for a model that was sharded while loading:

- tensor parallelism on a CPU;
- checkpoints with optimizer state, that resume at the same or at another layout;
- metrics and predictions that hold every example once, and token counts that count every token once;
- label smoothing and the mean over predicted tokens in the model's own vocabulary-parallel loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from hf_megatron.errors import ParallelStateError, UnsupportedError
from hf_megatron.models.pretrained import MegatronModelMixin
from hf_megatron.training_state import (
    begin_checkpoint,
    finish_checkpoint,
    load_optimizer,
    load_random_state,
    save_optimizer,
    save_random_state,
)

__all__ = ["MegatronTrainer"]

logger = logging.get_logger(__name__)


class _AnyDeviceParallelismConfig(ParallelismConfig):
    """accelerate's parallelism configuration, which it accepts on GPUs only; on a CPU the same layout works."""

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        if accelerator.device.type != "cpu":
            super()._validate_accelerator(accelerator)


class MegatronTrainer(Trainer):
    """A drop-in :class:`transformers.Trainer` for one process, TP, TP x FSDP2 and TP x replicated data parallelism.

    The layout is the model's: whatever ``DistributedConfig`` it was loaded or built with. Arguments, callbacks and
    outputs are the stock class's; with a stock model it behaves as the stock class does, but for the checkpoints, which
    have another form (see ``training_state``).
    """

    def __init__(self, model: nn.Module | None = None, args: Any = None, *pargs: Any, **kwargs: Any) -> None:
        _check_processes(args)
        # The stock class refuses to save the optimizer of a model sharded while loading, as it cannot; this one can.
        saves_all = args is not None and not args.save_only_model
        if saves_all:
            args.save_only_model = True
        try:
            super().__init__(model, args, *pargs, **kwargs)
        finally:
            if saves_all:
                args.save_only_model = False
        if self._has_own_loss:
            # The stock smoother reads whole logits, which there are none of in training. compute_loss passes it on.
            self.label_smoother = None

    # ------------------------------------------------------------------ layout

    @property
    def _own_model(self) -> MegatronModelMixin | None:
        """The model inside wrappers (compilation, adapters), if it is one of this package."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        return model if isinstance(model, MegatronModelMixin) else None

    @property
    def _has_own_loss(self) -> bool:
        model = self._own_model
        return model is not None and model.has_vocab_parallel_loss

    @property
    def _data_parallel_rank(self) -> int:
        rank: int = self.args.process_index // self.get_tp_size()
        return rank

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator for the model's layout, on any device."""
        tp_size = getattr(self.model, "tp_size", None) or 1
        given = self.args.parallelism_config
        if tp_size > 1 and given is None:
            dp_size = self.model.config.distributed_config.dp_size
            self.args.parallelism_config = _AnyDeviceParallelismConfig(tp_size=tp_size, dp_shard_size=dp_size)
        try:
            super().create_accelerator_and_postprocess()
        finally:
            self.args.parallelism_config = given
        if tp_size > 1:
            self.accelerator.gather_for_metrics = self._gather_for_metrics
            self.gather_function = self._gather_for_metrics

    def _gather_for_metrics(self, data: Any, use_gather_object: bool = False) -> Any:
        """Gather every example once: the ranks of a tensor-parallel group hold the same ones."""
        if use_gather_object:
            raise UnsupportedError("eval_use_gather_object=True is not supported under tensor parallelism.")
        accelerator = self.accelerator
        with _attribute(accelerator, "gather", self._gather_once_per_group):
            return Accelerator.gather_for_metrics(accelerator, data)

    def _gather_once_per_group(self, data: Any) -> Any:
        gathered = Accelerator.gather(self.accelerator, data)
        return _map_tensors(gathered, self._first_of_each_group)

    def _first_of_each_group(self, gathered: torch.Tensor) -> torch.Tensor:
        """Of [world x n, ...], the rows of each tensor-parallel group's first rank."""
        parts = gathered.chunk(self.accelerator.num_processes) if gathered.shape[0] else (gathered,)
        return torch.cat(parts[:: self.get_tp_size()])

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        # The stock count adds up all processes, of which those of a group see the same tokens.
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.get_tp_size()

    # ------------------------------------------------------------------ loss

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock method; label smoothing happens inside the model's loss where that is vocabulary-parallel."""
        if self.args.label_smoothing_factor and self._has_own_loss:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        return super().compute_loss(model, inputs, *args, **kwargs)

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_directory = Path(self._get_output_dir(trial=trial))
        destination = run_directory / f"checkpoint-{self.state.global_step}"
        is_first = self.is_world_process_zero()
        fresh = begin_checkpoint(destination, is_first=is_first)
        self._save_model_into(fresh)
        if not self.args.save_only_model:
            save_optimizer(self.model, _inner(self.optimizer), fresh)
            self._save_scaler(str(fresh))
            if is_first:
                torch.save(self.lr_scheduler.state_dict(), fresh / "scheduler.pt")
            if self.args.process_index % self.get_tp_size() == 0:
                save_random_state(fresh, self._data_parallel_rank)
        best = run_directory / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == destination or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        if is_first:
            self._save_trainer_state(fresh)
        finish_checkpoint(fresh, destination, is_first=is_first)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(destination))
        if is_first:
            rotate_checkpoints(
                output_dir=str(run_directory),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save_model_into(self, directory: Path) -> None:
        """The model as it lies: each rank's shards if it is cut, else as ``save_model`` does."""
        if self._own_model is None or not self.is_distributed_loading_by_transformers:
            self.save_model(str(directory), _internal_call=True)
            return
        self.model.save_pretrained(directory, distributed_checkpoint=True)
        if self.is_world_process_zero():
            if self.processing_class is not None:
                self.processing_class.save_pretrained(directory)
            torch.save(self.args, directory / "training_args.bin")

    def _save_trainer_state(self, directory: Path) -> None:
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(state)
                else:
                    self.state.stateful_callbacks[name] = state
        self.state.save_to_json(str(directory / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._own_model is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._own_model.load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self._own_model is None:
            super()._load_best_model()
        else:
            logger.info(f"Loading the best model, {self.state.best_model_checkpoint} ({self.state.best_metric}).")
            self._own_model.load_weights(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self.model, _inner(self.optimizer), Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not load_random_state(Path(checkpoint), self._data_parallel_rank):
            logger.warning(
                f"{checkpoint} has no random state for data-parallel rank {self._data_parallel_rank} (it was saved by "
                "fewer); dropout and shuffling go on with other random numbers."
            )


def _check_processes(args: Any) -> None:
    """Refuse arguments that do not see the other processes; each rank would take itself for the only one."""
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    if args is not None and args.world_size != num_processes:
        raise ParallelStateError(
            f"there are {num_processes} processes, but TrainingArguments sees {args.world_size}. On a machine without "
            "a GPU, pass TrainingArguments(use_cpu=True)."
        )


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _map_tensors(data: Any, function: Any) -> Any:
    if isinstance(data, torch.Tensor):
        return function(data)
    if isinstance(data, dict):
        return type(data)({name: _map_tensors(value, function) for name, value in data.items()})
    if isinstance(data, (list, tuple)):
        return type(data)(_map_tensors(value, function) for value in data)
    return data


@contextmanager
def _attribute(instance: Any, name: str, value: Any) -> Iterator[None]:
    """Give an instance an attribute of its own, in place of its class's, for a while."""
    setattr(instance, name, value)
    try:
        yield
    finally:
        delattr(instance, name)
