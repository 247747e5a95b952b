"""Checkpoints that are written while training goes on: a copy of the state in memory, and a thread that writes it.

The thread does everything that a blocking save does, with collectives in a group of its own, so that what it publishes
is as safe. ``torch.distributed.checkpoint.async_save`` would begin one write per call, each with its own thread and
without our publication; its stager is what copies here.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import PreTrainedModel
from transformers.distributed.checkpoint import _redistribute_state_dict
from transformers.utils import logging

from hf_megatron.models.processes import is_first_rank, one_process_allowed
from hf_megatron.training.optimizer_state import optimizer_state, write_optimizer_state

logger = logging.get_logger(__name__)


@dataclass
class Snapshot:
    """Copies of a step's state, on the CPU."""

    model: dict[str, Any]  # by parameter name, the shards of this rank; or, on rank 0 alone, whole parameters
    optimizer: dict[str, Any] | None
    files: TemporaryDirectory[str]  # this rank's small files

    def write(self, model: PreTrainedModel | None, group: dist.ProcessGroup | None, directory: Path) -> None:
        """Write all of it, a whole ``model`` by its own method; every rank of the group must call it."""
        shutil.copytree(self.files.name, directory, dirs_exist_ok=True)
        self.files.cleanup()
        if model is not None:
            model.save_pretrained(directory, state_dict=self.model)
        elif self.model:
            writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
            with one_process_allowed():
                dcp.save(self.model, storage_writer=writer, process_group=group)
        if self.optimizer is not None:
            write_optimizer_state(self.optimizer, directory, group)


class BackgroundWriter:
    """Takes snapshots, and writes one at a time in a thread; the next one waits for it, and raises its error."""

    def __init__(self, timeout: Any) -> None:
        """``timeout`` is how long a rank waits for the others; every rank must make a writer."""
        self.group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        has_gpu = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=has_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=has_gpu,
            )
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def snapshot(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer | None,
        files: TemporaryDirectory[str],
        *,
        is_whole: bool,
    ) -> Snapshot:
        """Copy the state of model and optimizer; every rank must call it.

        Collective: one for each tensor that FSDP has cut on the same dimension as tensor parallelism.
        """
        state: dict[str, Any] = {"model": {}}
        if not is_whole or is_first_rank():
            state["model"] = _redistribute_state_dict(get_model_state_dict(model))
        if optimizer is not None:
            state["optimizer"] = optimizer_state(model, optimizer)
        staged: Any = self._stager.stage(state)
        return Snapshot(staged["model"], staged.get("optimizer"), files)

    def start(self, write: Callable[[], None]) -> None:
        """Let the thread write; it does not keep the process from ending, as its peers may be gone."""

        def run() -> None:
            try:
                with torch.no_grad():
                    write()
            except BaseException as error:
                self._error = error

        assert self._thread is None
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was started is written; raises an error of the thread's."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
