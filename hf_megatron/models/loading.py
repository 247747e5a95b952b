"""Reading checkpoints into our models: each rank its own slices, whatever the spelling.

What is private of transformers' loader is overridden here; ``private_interfaces`` says what breaks when it changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.modeling_utils import LoadStateDictConfig, _is_on_hf_mount
from transformers.utils import logging

from hf_megatron.checkpoint import LazyTensor, canonicalise, open_checkpoint, open_files
from hf_megatron.checkpoint.mapping import MappedFiles
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, CheckpointShapeError
from hf_megatron.models.processes import share_failure
from hf_megatron.tensor_parallel import non_finite_names

logger = logging.get_logger(__name__)

Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]  # a tensor's name, its shape in the file and in the model

# ``disable_mmap`` of the call; of a ``tp`` directory the stock method passes it on to nobody.
_MAY_MAP = ContextVar("may_map", default=True)


@contextmanager
def mapping(allowed: bool) -> Iterator[None]:
    """Whether weights may stay in the files that are loaded inside."""
    token = _MAY_MAP.set(allowed)
    try:
        yield
    finally:
        _MAY_MAP.reset(token)


def _mapped(tensors: Mapping[str, LazyTensor], files: Iterable[Path]) -> dict[str, LazyTensor]:
    """The same tensors, whose parts stay in their files wherever a model can use them there."""
    may_map = _MAY_MAP.get() and not any(map(_is_on_hf_mount, files))
    mapped = MappedFiles() if may_map else None
    return {name: replace(tensor, mapped=mapped) for name, tensor in tensors.items()}


class LoadingMixin:
    """Loading of ``MegatronModelMixin``."""

    def _canonical(
        self: Any, stored: Mapping[str, LazyTensor], *, ignore_mismatched_sizes: bool = False
    ) -> tuple[dict[str, LazyTensor], tuple[Mismatch, ...]]:
        """The stored tensors under this model's names, whatever the spelling, and those of another shape, left out."""
        config = self.config.to_dict()
        canonical = canonicalise(stored, self.architecture, config, self._model_class())
        ignored = {name for name, _, _ in canonical.mismatched}
        if canonical.dropped:
            logger.warning_once(f"Not used by this model, and dropped: {', '.join(canonical.dropped)}.")
        if canonical.mismatched and not ignore_mismatched_sizes:
            # Noticed here because a rank that compared its own slice might find it right where another finds it wrong.
            shapes = "; ".join(f"{n} is {list(s)}, expected {list(e)}" for n, s, e in canonical.mismatched)
            raise CheckpointShapeError(
                f"{len(canonical.mismatched)} tensors do not have the shape the configuration asks for: {shapes}. "
                "Correct config.json, or pass ignore_mismatched_sizes=True to draw them anew."
            )
        fitting = {name: tensor for name, tensor in canonical.tensors.items() if name not in ignored}
        return {**fitting, **{name: stored[name] for name in canonical.unknown}}, canonical.mismatched

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: Mapping[str, Any] | None,
        checkpoint_files: Sequence[str] | None,
        load_config: LoadStateDictConfig,
        expected_keys: list[str] | None = None,
    ) -> Any:
        mismatched: tuple[Mismatch, ...] = ()
        is_on_disk = load_config.device_map is not None and "disk" in load_config.device_map.values()
        if state_dict is None and checkpoint_files is not None and not is_on_disk:
            files = [Path(file) for file in checkpoint_files]
            state_dict, mismatched = model._canonical(
                _mapped(open_files(files), files),
                ignore_mismatched_sizes=load_config.ignore_mismatched_sizes,
            )
            checkpoint_files = None
        loading_info, offload_index = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        for name, shape, expected in mismatched:
            loading_info.missing_keys.discard(name)
            loading_info.mismatched_keys.add((name, torch.Size(shape), torch.Size(expected)))
        broken = non_finite_names(model)
        if broken:
            logger.warning(f"These weights are inf or nan in the checkpoint: {', '.join(broken)}.")
        return loading_info, offload_index

    def _load_and_finalize_distributed_pretrained_model(
        self, distributed_checkpoint_dir: str | os.PathLike[str], device_map: Any, device_mesh: Any
    ) -> Any:
        # Stock loads such a directory through torch's distributed checkpoints, which do not notice a missing shard,
        # know one spelling and one head only, and make every rank look at every file.
        checkpoint = open_checkpoint(Path(distributed_checkpoint_dir))
        load_config = LoadStateDictConfig(
            pretrained_model_name_or_path=str(distributed_checkpoint_dir),
            device_map=device_map,
            device_mesh=device_mesh,
            dtype=self.dtype,  # type: ignore[attr-defined]
        )
        state_dict, _ = self._canonical(_mapped(checkpoint.tensors, checkpoint.files))
        loading_info, _ = self._load_pretrained_model(self, state_dict, None, load_config)
        return self._finalize_model_loading(self, load_config, loading_info)  # type: ignore[attr-defined]

    def load_weights(self, directory: str | os.PathLike[str]) -> None:
        """Replace this model's weights by those of a Hub or ``tp`` directory of any degree, each rank its slices.

        CheckpointError if the directory is not complete, or not of this model.
        """
        checkpoint = open_checkpoint(Path(directory))
        state_dict, _ = self._canonical(_mapped(checkpoint.tensors, checkpoint.files))
        missing = [name for name, _ in self.named_parameters() if name not in state_dict]  # type: ignore[attr-defined]
        if missing:
            raise CheckpointIncompleteError(f"{directory} lacks {', '.join(missing)}; nothing was loaded.")
        with torch.no_grad():
            for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
                if isinstance(parameter, DTensor):
                    part = DtensorShardOperation(parameter).shard_tensor(state_dict[name])
                    parameter.to_local().copy_(part)
                else:
                    parameter.copy_(state_dict[name][...])
        broken = non_finite_names(self)  # type: ignore[arg-type]
        message = f"{directory} holds weights that are inf or nan: {', '.join(broken)}."
        # Only the rank that holds them sees it.
        share_failure(CheckpointFormatError(message) if broken else None)
