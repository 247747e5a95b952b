"""Additions to ``save_pretrained``: writing the stock config and removing stale shards."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.distributed.checkpoint import _save_model_checkpoint_distributed
from transformers.utils import logging

from hf_megatron.architectures import Architecture
from hf_megatron.checkpoint import AtomicDirectory
from hf_megatron.checkpoint.sharded import is_shard
from hf_megatron.errors import DestinationError, UnsupportedError
from hf_megatron.models.processes import barrier, is_first_rank, one_process_allowed, share_failure
from hf_megatron.models.uploading import Upload

logger = logging.get_logger(__name__)

SHA256SUMS = "SHA256SUMS"
"""The checksums of a converted directory, which a save into it makes wrong."""
# File names of whole weights, in one file or several; optimizer states and adapters have other names.
_WHOLE_WEIGHTS = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)(\.index\.json)?"
)


def rewrite_config(directory: Path, table: Architecture, class_name: str, *, stock: bool) -> None:
    """Set the model type and class in ``config.json`` to the stock ones or ours; keep everything else.

    ``class_name`` is the saved model's, the stock one or ours.
    """
    path = directory / "config.json"
    config = table.config_of(json.loads(path.read_text(encoding="utf-8")), table.model_class(class_name), stock=stock)
    mismatch = table.stock_mismatch(config) if stock else None
    if mismatch is not None:
        logger.warning(mismatch)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def remove_stale(directory: Path) -> None:
    """Remove what does not belong to the whole weights that a directory now contains: shards, and old checksums."""
    (directory / SHA256SUMS).unlink(missing_ok=True)
    if any((directory / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        for path in directory.iterdir():
            if is_shard(path):
                path.unlink()


def is_not_weights(entry: Path) -> bool:
    """Whether an entry of a directory, such as a tokenizer, is kept when a distributed save replaces the model."""
    return not is_shard(entry) and _WHOLE_WEIGHTS.fullmatch(entry.name) is None and entry.name != SHA256SUMS


def reasons(error: CheckpointException) -> str:
    """Summarize a CheckpointException by rank; its own text is a nested traceback."""
    found = {f"{type(cause).__name__}: {cause}": rank for rank, (cause, _) in reversed(error.failures.items())}
    return "; ".join(f"rank {rank}: {reason}" for reason, rank in found.items())


class SavingMixin:
    """Saving of ``MegatronModelMixin``."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, stock: bool = False, **kwargs: Any
    ) -> None:
        """Save as stock ``save_pretrained`` does; every rank of a distributed model must call it.

        ``distributed_checkpoint=True`` writes a ``tp`` directory, in which each rank saves its own shards. ``stock``
        writes the stock ``model_type`` and class into ``config.json``, so that the directory loads in transformers
        without this package; the tensors are the same either way.

        Raises:
            UnsupportedError: ``stock`` together with ``distributed_checkpoint``, which no stock GPT-2 can load.
            ParallelStateError: Rank 0 could not upload.
        """
        distributed = bool(kwargs.get("distributed_checkpoint"))
        if distributed and stock:
            raise UnsupportedError(
                "stock=True with distributed_checkpoint=True: stock models cannot load a sharded directory of this "
                "architecture. Save without distributed_checkpoint, or convert with `hf-megatron convert --to hub`."
            )
        # A model that lies whole in each process may be saved by one rank alone, as Trainer does under DDP.
        is_collective = distributed or self.is_distributed_loading_by_transformers  # type: ignore[attr-defined]
        directory = Path(save_directory).absolute()
        if distributed and directory.resolve() == Path.cwd():
            raise DestinationError(
                f"a distributed checkpoint takes its directory's place as a whole, which the current directory "
                f"({directory}) cannot be replaced with; save into a directory of its own."
            )
        is_writer = is_first_rank() and kwargs.get("is_main_process", True)
        # The stock method would upload too early: the directory has neither its name nor the config it is to have.
        upload = None
        if kwargs.get("push_to_hub"):
            upload = Upload(self, directory, kwargs, is_collective=is_collective, is_writer=is_writer)
        if distributed:
            fresh = AtomicDirectory(directory, keep=is_not_weights, is_first=is_first_rank(), meet=share_failure)
            with fresh:
                self._save_files(fresh.path, *args, is_writer=is_writer, stock=stock, **kwargs)
                fresh.publish()
        else:
            if is_collective:
                barrier()
            self._save_files(directory, *args, is_writer=is_writer, stock=stock, **kwargs)
            if is_writer:
                remove_stale(directory)
            if is_collective:
                barrier()
        if upload is not None:
            upload.run()

    def save_configuration(self: Any, directory: Path) -> None:
        """Write what a distributed save has beside the shards; one rank calls it."""
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.architectures = [self._model_class().ours]
        self.config.save_pretrained(directory)
        if self.can_generate():
            self.generation_config.save_pretrained(directory)
        rewrite_config(directory, self.architecture, self._model_class().ours, stock=False)

    def _save_files(self: Any, directory: Path, *args: Any, is_writer: bool, stock: bool, **kwargs: Any) -> None:
        super().save_pretrained(directory, *args, **kwargs)  # type: ignore[misc]
        if is_writer and (directory / "config.json").is_file():
            rewrite_config(directory, self.architecture, self._model_class().ours, stock=stock)

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Same as the stock method; every rank of a sharded model must call it.

        The first one uploads, in one commit; if it could not, all raise ParallelStateError.
        """
        if not self.is_distributed_loading_by_transformers:  # type: ignore[attr-defined]
            return super().push_to_hub(repo_id, *args, **kwargs)  # type: ignore[misc]
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(scratch, push_to_hub=True, repo_id=repo_id, **kwargs)
        return None

    def save_distributed_checkpoint(
        self, model_to_save: nn.Module, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Save this rank's shards; a model that lies whole in one process is saved as the one shard it is."""
        try:
            if any(isinstance(parameter, DTensor) for parameter in model_to_save.parameters()):
                super().save_distributed_checkpoint(model_to_save, save_directory, **kwargs)  # type: ignore[misc]
                return
            with one_process_allowed():
                _save_model_checkpoint_distributed(model_to_save, save_directory)
        except CheckpointException as error:
            raise DestinationError(f"{save_directory} could not be written: {reasons(error)}") from error

    def gather_sharded_state_dict_for_save(
        self,
        model_to_save: nn.Module,
        state_dict: dict[str, Any],
        distributed_config: DistributedConfig | None,
        *,
        save_on_this_rank: bool = True,
    ) -> dict[str, Any]:
        """Gather one tensor at a time, and keep it only where it is written."""
        if distributed_config is None or distributed_config.dp_size > 1 or distributed_config.tp_size == 1:
            gathered: dict[str, Any] = super().gather_sharded_state_dict_for_save(  # type: ignore[misc]
                model_to_save, state_dict, distributed_config, save_on_this_rank=save_on_this_rank
            )
            return gathered
        gathered = {}
        for name, value in state_dict.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if save_on_this_rank:
                gathered[name] = full.detach().cpu().contiguous() if isinstance(full, torch.Tensor) else full
        return gathered
