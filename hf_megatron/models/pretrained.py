"""Sharded construction, loading and saving, added to ``PreTrainedModel``.

This module overrides private methods of transformers' loader; see ``private_interfaces``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.checkpoint import _save_model_checkpoint_distributed
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from hf_megatron.architectures import ModelClass, PartitionTable
from hf_megatron.checkpoint import AtomicDirectory, LazyTensor, canonicalise, open_checkpoint, open_files
from hf_megatron.errors import (
    CheckpointFormatError,
    CheckpointIncompleteError,
    CheckpointShapeError,
    DestinationError,
    UnsupportedError,
)
from hf_megatron.models.initialization import fill_normal, initialization_seed, local_seed, seed_of_first_rank
from hf_megatron.models.processes import (
    barrier,
    check_distributed_config,
    is_first_rank,
    one_process_allowed,
    quiet_loading,
    refuse_quantization,
    share_failure,
)
from hf_megatron.models.recomputation import RecomputationMixin
from hf_megatron.models.resizing import ResizingMixin
from hf_megatron.models.saving import is_not_weights, reasons, remove_shards, rewrite_config
from hf_megatron.models.uploading import HubMixin, Upload
from hf_megatron.tensor_parallel import SINGLE, TensorParallelGroup, non_finite_names, synchronize_random_state

logger = logging.get_logger(__name__)

Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]  # a tensor's name, its shape in the file and in the model


class MegatronModelMixin(RecomputationMixin, ResizingMixin, HubMixin):
    """Mixin of all model classes, in addition to the stock ``PreTrainedModel``.

    Attributes:
        tp_group: The tensor-parallel group; one rank unless the model was loaded or built on several.
        sequence_parallel: Whether activations outside of attention and MLP are split along the sequence.
    """

    tp_group: TensorParallelGroup = SINGLE
    sequence_parallel: bool = False
    # Whether the loss takes num_items_in_batch and label_smoothing, as the vocabulary-parallel ones do. The losses of
    # the other heads are the stock ones, means over their own batch, and Trainer has to know.
    has_vocab_parallel_loss: ClassVar[bool] = False
    accepts_loss_kwargs: ClassVar[bool] = False
    _initialization_seed: int | None = None

    @classmethod
    def partition_table_of(cls, config: PreTrainedConfig) -> PartitionTable:
        """The partition table for a configuration."""
        raise NotImplementedError

    @property
    def partition_table(self) -> PartitionTable:
        """The partition table of this model."""
        return self.partition_table_of(self.config)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ building

    def _init_pretrained(self, config: PreTrainedConfig) -> None:
        """``PreTrainedModel.__init__`` without the modules of the stock class we derive from."""
        refuse_quantization(getattr(config, "quantization_config", None))
        distributed_config = getattr(config, "distributed_config", None)
        if distributed_config is not None:
            self.partition_table_of(config).check_degree(config.to_dict(), distributed_config.tp_size)
        PreTrainedModel.__init__(self, config)

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        *,
        distributed_config: DistributedConfig | dict[str, Any] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build a model with new weights, sharded over the ranks from the start.

        The full weights are the same, bit for bit, for every layout with the same seed.

        Args:
            config: The model's configuration.
            distributed_config: The layout; one process if None. Every rank must make this call.
            seed: What to draw the weights from; rank 0's ``torch.initial_seed()`` if None.
            **kwargs: ``dtype`` and ``attn_implementation``, as for ``AutoModel.from_config``.

        Returns:
            The model in training mode, as stock ``from_config`` gives it.

        Raises:
            PartitionError: The configuration cannot be cut for this degree.
            ParallelStateError: The layout does not fit the number of processes.
        """
        return cls._from_config(config, distributed_config=distributed_config, seed=seed, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Self:
        distributed_config = kwargs.pop("distributed_config", None)
        with initialization_seed(kwargs.pop("seed", None)):
            if distributed_config is None:
                # The layers' constructors draw weights that are replaced at once. A model that is cut is built without
                # them; so that what follows draws the same numbers in both, they leave no trace here either.
                devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
                with torch.random.fork_rng(devices):
                    return super()._from_config(config, **kwargs)  # type: ignore[misc,no-any-return]
            dtype = kwargs.pop("dtype", None) or config.dtype or torch.get_default_dtype()
            with quiet_loading():  # the empty checkpoint is intentional
                model: Self = cls.from_pretrained(
                    None, config=config, state_dict={}, dtype=dtype, distributed_config=distributed_config, **kwargs
                )
        model.config.name_or_path = ""  # type: ignore[attr-defined]
        return model.train()  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def prepare_distribute_model(
        cls, distributed_config: DistributedConfig | dict[str, Any] | None, device_map: Any = None
    ) -> Any:
        """Create the process group and the mesh, and reject unsupported options before reading any weights."""
        if isinstance(distributed_config, dict):
            distributed_config = DistributedConfig.from_dict(distributed_config)
        if distributed_config is not None:
            check_distributed_config(distributed_config)
        return super().prepare_distribute_model(distributed_config, device_map)  # type: ignore[misc]

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: DistributedConfig | None, mesh_manager: Any) -> Any:
        """Shard the parameters, and synchronize random states and the seed for new weights across ranks."""
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc]
        if mesh_manager is None or distributed_config is None:
            return model
        mesh = mesh_manager.get_mesh("tp")
        device = torch.device(mesh.device_type)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        group, seed = TensorParallelGroup.from_mesh(mesh), seed_of_first_rank(device)
        synchronize_random_state(group, device)
        for module in model.modules():
            if isinstance(module, MegatronModelMixin):
                module.tp_group, module._initialization_seed = group, seed
                module.sequence_parallel = distributed_config.enable_sequence_parallel and group.size > 1
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Not in the model: a module that resize_token_embeddings fills before it takes the rows it needs.
        module_name = next((name for name, child in self.named_modules() if child is module), "")  # type: ignore[attr-defined]
        seed = local_seed() if self._initialization_seed is None else self._initialization_seed
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            name = f"{module_name}.{parameter_name}"
            if isinstance(module, nn.LayerNorm) and parameter_name == "weight":
                parameter.fill_(1.0)
            elif parameter_name == "bias":
                parameter.zero_()
            else:
                zero_row = module.padding_idx if isinstance(module, nn.Embedding) else None
                fill_normal(parameter, self._initial_std(name), seed, name, zero_row=zero_row)

    def _initial_std(self, name: str) -> float:
        """Standard deviation of the initial weights of the parameter ``name``, relative to this model."""
        return float(self.config.initializer_range)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """Same as the stock method, with ``distributed_config`` for the layout; every rank must call it.

        Raises:
            CheckpointError: The directory is not complete, or not of this model.
            UnsupportedError: ``quantization_config`` is given, or the configuration asks for what these models lack.
        """
        refuse_quantization(kwargs.get("quantization_config"))
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc,no-any-return]

    def _partition_class(self) -> ModelClass:
        """This model's entry in the table; a subclass is treated like the class of this package it derives from."""
        for python_class in type(self).__mro__:
            for model_class in self.partition_table.classes:
                if python_class.__name__ == model_class.ours:
                    return model_class
        raise UnsupportedError(f"{type(self).__name__} does not derive from a class of this package.")

    def _canonical(
        self, stored: Mapping[str, LazyTensor], *, ignore_mismatched_sizes: bool = False
    ) -> tuple[dict[str, LazyTensor], tuple[Mismatch, ...]]:
        """Map stored tensors to this model's names; those with a wrong shape are returned separately."""
        config = self.config.to_dict()  # type: ignore[attr-defined]
        canonical = canonicalise(stored, self.partition_table, config, self._partition_class())
        ignored = {name for name, _, _ in canonical.mismatched}
        if canonical.dropped:
            logger.warning_once(f"Not used by this model, and dropped: {', '.join(canonical.dropped)}.")
        if canonical.mismatched and not ignore_mismatched_sizes:
            # Check here, on the full tensor: a rank that compared only its slice could disagree with the others.
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
            state_dict, mismatched = model._canonical(
                open_files([Path(file) for file in checkpoint_files]),
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
        # The stock method uses torch's distributed checkpoints, which do not detect missing shards, support a single
        # spelling and head, and make every rank open every file.
        checkpoint = open_checkpoint(Path(distributed_checkpoint_dir))
        load_config = LoadStateDictConfig(
            pretrained_model_name_or_path=str(distributed_checkpoint_dir),
            device_map=device_map,
            device_mesh=device_mesh,
            dtype=self.dtype,  # type: ignore[attr-defined]
        )
        state_dict, _ = self._canonical(checkpoint.tensors)
        loading_info, _ = self._load_pretrained_model(self, state_dict, None, load_config)
        return self._finalize_model_loading(self, load_config, loading_info)  # type: ignore[attr-defined]

    def load_weights(self, directory: str | os.PathLike[str]) -> None:
        """Load weights from a checkpoint directory into this model; each rank reads its own slices.

        Args:
            directory: A Hub or ``tp`` directory of this model, at any degree.

        Raises:
            CheckpointError: The directory is not complete, or not of this model.
        """
        state_dict, _ = self._canonical(open_checkpoint(Path(directory)).tensors)
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
        # Only the rank that holds the values can detect them.
        share_failure(CheckpointFormatError(message) if broken else None)

    # ------------------------------------------------------------------ saving

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, stock: bool = False, **kwargs: Any
    ) -> None:
        """Save as stock ``save_pretrained`` does; every rank of a distributed model must call it.

        Args:
            save_directory: Where to save.
            *args: As for the stock method.
            stock: Write the stock ``model_type`` and class into ``config.json``, so that the directory loads in
                transformers without this package. The tensors are the same either way.
            **kwargs: As for the stock method; ``distributed_checkpoint=True`` writes a ``tp`` directory, in which each
                rank saves its own shards.

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
        # An unsharded model may be saved by one rank alone, as Trainer does under DDP.
        is_collective = distributed or self.is_distributed_loading_by_transformers  # type: ignore[attr-defined]
        directory = Path(save_directory).absolute()
        if distributed and directory.resolve() == Path.cwd():
            raise DestinationError(
                f"a distributed checkpoint takes its directory's place as a whole, which the current directory "
                f"({directory}) cannot be replaced with; save into a directory of its own."
            )
        is_writer = is_first_rank() and kwargs.get("is_main_process", True)
        # The stock method would upload before the directory has its final name and config.
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
                remove_shards(directory)
            if is_collective:
                barrier()
        if upload is not None:
            upload.run()

    def _save_files(self, directory: Path, *args: Any, is_writer: bool, stock: bool, **kwargs: Any) -> None:
        super().save_pretrained(directory, *args, **kwargs)  # type: ignore[misc]
        if is_writer and (directory / "config.json").is_file():
            rewrite_config(directory, self.partition_table, self._partition_class().ours, stock=stock)

    def save_distributed_checkpoint(
        self, model_to_save: nn.Module, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Save this rank's shards; an unsharded model is saved as a single shard."""
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
        """Gather one tensor at a time, and keep it only on the ranks that write."""
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

    # ------------------------------------------------------------------ changing and using

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # The stock method searches the module's source for an attention class that looks up its kernel by name; ours
        # does so in its base class.
        return True
