"""Saving, resuming and uploading checkpoints in ``MegatronTrainer``; they resume at any layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer import SCALER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_megatron.checkpoint import AtomicDirectory
from hf_megatron.errors import CheckpointFormatError, DestinationError, HfMegatronError
from hf_megatron.models.pretrained import MegatronModelMixin
from hf_megatron.models.processes import barrier, share_failure
from hf_megatron.models.saving import rewrite_config
from hf_megatron.training.optimizer_state import load_optimizer, save_optimizer
from hf_megatron.training.rank_guard import GuardedTrainer
from hf_megatron.training.training_state import (
    finish_checkpoint,
    load_random_state,
    load_scheduler,
    read_state,
    remove_old_checkpoints,
    save_random_state,
)

logger = logging.get_logger(__name__)


class CheckpointingTrainer(GuardedTrainer):
    """Trainer with checkpoints for sharded models and optimizers, unsharded models and adapters."""

    @property
    def _own_model(self) -> MegatronModelMixin | None:
        """The unwrapped model (without compilation or adapters), if it belongs to this package."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        return model if isinstance(model, MegatronModelMixin) else None

    @property
    def _is_adapted(self) -> bool:
        """Whether the model has a peft adapter; then only the adapter is trained, saved and loaded."""
        return hasattr(self.accelerator.unwrap_model(self.model), "get_base_model")

    @property
    def _is_cut(self) -> bool:
        """Whether each rank saves its own shards; False for unsharded models and for adapters."""
        return self._own_model is not None and not self._is_adapted and self.is_distributed_loading_by_transformers

    @property
    def _data_parallel_rank(self) -> int:
        return int(self.args.process_index // self.get_tp_size())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False, *, stock: bool = False) -> None:
        """As the stock method; every rank must call it.

        Args:
            output_dir: Where to save; ``args.output_dir`` if None.
            stock: Write the stock ``model_type``, so that the directory loads in transformers without this package. The
                tensors are the same either way, and an adapter is an ordinary one anyway.
        """
        model = self._own_model
        if not stock or model is None or self._is_adapted:
            super().save_model(output_dir, _internal_call)
            return
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            rewrite_config(directory, model.architecture, model._model_class().ours, stock=True)
        if self.is_distributed_loading_by_transformers:
            barrier()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._compare("before the checkpoint of")
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_directory = Path(self._get_output_dir(trial=trial))
        destination = run_directory / f"checkpoint-{self.state.global_step}"
        with AtomicDirectory(destination, is_first=self.is_world_process_zero(), meet=share_failure) as directory:
            try:
                self._write_checkpoint(directory.path, run_directory, destination)
                finish_checkpoint(directory)
            except (Exception, CheckpointException) as error:
                if destination.exists() and not directory.path.exists():
                    raise  # the checkpoint is complete; a later step failed
                if isinstance(error, HfMegatronError) and not isinstance(error, DestinationError):
                    raise
                reason = str(error) if isinstance(error, DestinationError) else f"{type(error).__name__}: {error}"
                state = "stays as it was" if destination.exists() else "is not there"
                raise DestinationError(
                    f"{destination} could not be written, and {state}: {reason} (bytes free on its disk: "
                    f"{shutil.disk_usage(run_directory).free:,})."
                ) from error
        if self.args.push_to_hub:
            self._push(destination)
        if self.is_world_process_zero():
            remove_old_checkpoints(run_directory, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_checkpoint(self, fresh: Path, run_directory: Path, destination: Path) -> None:
        is_first = self.is_world_process_zero()
        self._save_model_into(fresh)
        if not self.args.save_only_model:
            save_optimizer(self.model, inner_optimizer(self.optimizer), fresh)
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

    def _push(self, checkpoint: Path) -> None:
        """Upload a checkpoint according to ``hub_strategy``, with the whole model; every rank must call it."""
        if self._is_cut and self.args.hub_strategy != HubStrategy.END:
            self.save_model(_internal_call=True)  # the stock method finds whole weights only
        _on_all(lambda: self._push_from_checkpoint(str(checkpoint)))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock method; every rank must call it, and a failure of the first is a ParallelStateError on all."""
        return _on_all(lambda: super(CheckpointingTrainer, self).push_to_hub(*args, **kwargs))

    def _save_model_into(self, directory: Path) -> None:
        """Save each rank's shards if the model is sharded; save unsharded models and adapters like ``save_model``."""
        if not self._is_cut:
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
                states, name = self.state.stateful_callbacks, type(callback).__name__
                if isinstance(states[name], list):
                    states[name].append(callback.state())
                else:
                    states[name] = callback.state()
        self.state.save_to_json(str(directory / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._own_model is None or self._is_adapted:
            _refuse_fsdp_files(Path(resume_from_checkpoint))
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._own_model.load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self._own_model is None or self._is_adapted:
            _refuse_fsdp_files(Path(self.state.best_model_checkpoint))
            super()._load_best_model()
        else:
            logger.info(f"Loading the best model, {self.state.best_model_checkpoint} ({self.state.best_metric}).")
            self._own_model.load_weights(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self.model, inner_optimizer(self.optimizer), Path(checkpoint))
            may_skip = self.accelerator.scaler is not None
            load_scheduler(self.lr_scheduler, Path(checkpoint), step=self.state.global_step, may_skip=may_skip)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            path = Path(checkpoint) / SCALER_NAME
            if path.is_file():  # a run resumed in float16 may have started in another dtype
                self.accelerator.scaler.load_state_dict(read_state(path))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not load_random_state(Path(checkpoint), self._data_parallel_rank):
            logger.warning(
                f"{checkpoint} has no random state for data-parallel rank {self._data_parallel_rank} (it was saved by "
                "fewer); dropout and shuffling go on with other random numbers."
            )


def _refuse_fsdp_files(directory: Path) -> None:
    """Refuse what accelerate would have torch unpickle; no checkpoint written here holds it."""
    if found := [path.name for path in directory.glob("pytorch_model_fsdp*")]:
        raise CheckpointFormatError(
            f"{directory} is refused: {', '.join(found)} is accelerate's own format, and loading it could run any code."
        )


def _on_all(action: Callable[[], Any]) -> Any:
    """Run a function and raise an error on all ranks if it fails on one."""
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    share_failure(error)
    return result


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
