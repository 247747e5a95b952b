"""Sharded construction, loading and saving, added to ``PreTrainedModel``.

This module overrides private methods of transformers' loader; see ``private_interfaces``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_megatron.architectures import Architecture, ModelClass
from hf_megatron.errors import UnsupportedError
from hf_megatron.models.configuration import STYLE_NAME
from hf_megatron.models.initialization import fill_normal, initialization_seed, local_seed, seed_of_first_rank
from hf_megatron.models.loading import LoadingMixin, mapping
from hf_megatron.models.processes import check_distributed_config, quiet_loading, refuse_quantization
from hf_megatron.models.recomputation import RecomputationMixin
from hf_megatron.models.resizing import ResizingMixin
from hf_megatron.models.saving import SavingMixin
from hf_megatron.tensor_parallel import SINGLE, TensorParallelGroup, synchronize_random_state

logger = logging.get_logger(__name__)


class MegatronModelMixin(RecomputationMixin, ResizingMixin, LoadingMixin, SavingMixin):
    """Base of our model classes, beside the stock ``PreTrainedModel`` they derive from."""

    tp_group: TensorParallelGroup = SINGLE  # one rank unless the model was loaded or built on several
    sequence_parallel: bool = False  # whether activations outside of attention and MLP are split along the sequence
    splits_last_hidden_state: ClassVar[bool] = False  # whether forward, given a region, leaves it split
    mask_follows_position_ids: ClassVar[bool] = False  # whether sequences packed in one row are kept apart by them
    # Whether the loss takes num_items_in_batch and label_smoothing, as the vocabulary-parallel ones do. The losses of
    # the other heads are the stock ones, means over their own batch, and Trainer has to know.
    has_vocab_parallel_loss: ClassVar[bool] = False
    accepts_loss_kwargs: ClassVar[bool] = False
    _initialization_seed: int | None = None
    _tp_plan: dict[str, str]

    @classmethod
    def architecture_of(cls, config: PreTrainedConfig) -> Architecture:
        """The table for a configuration."""
        raise NotImplementedError

    @property
    def architecture(self) -> Architecture:
        """The table of this model's architecture."""
        return self.architecture_of(self.config)  # type: ignore[attr-defined]

    def _model_class(self) -> ModelClass:
        """This model's row of the table; a subclass of one of our classes is treated as that class."""
        for python_class in type(self).__mro__:
            for model_class in self.architecture.classes:
                if python_class.__name__ == model_class.ours:
                    return model_class
        raise UnsupportedError(f"{type(self).__name__} does not derive from a class of this package.")

    def _init_pretrained(self, config: PreTrainedConfig) -> None:
        """``PreTrainedModel.__init__`` without the modules of the stock class we derive from."""
        refuse_quantization(getattr(config, "quantization_config", None))
        distributed_config = getattr(config, "distributed_config", None)
        if distributed_config is not None:
            self.architecture_of(config).check_degree(config.to_dict(), distributed_config.tp_size)
        PreTrainedModel.__init__(self, config)

    def warn_if_padding_and_no_attention_mask(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> None:
        """Same as the stock method, which reads ids, on CPUs; elsewhere each forward would wait for the device."""
        if input_ids.is_cpu:
            super().warn_if_padding_and_no_attention_mask(input_ids, attention_mask)  # type: ignore[misc]

    def init_parallel_plans(self) -> None:
        """Same as the stock method, with the modules of this class's head."""
        super().init_parallel_plans()  # type: ignore[misc]
        self._tp_plan |= dict.fromkeys((rule.module for rule in self._model_class().head), STYLE_NAME)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As the stock method, with ``distributed_config`` for the layout; every rank must make the call.

        Weights stay in their files, mapped privately, where a rank's part lies there as it is used (see
        ``checkpoint.mapping``); ``disable_mmap=True`` copies all.

        CheckpointError if the directory is not complete, or not of this model; UnsupportedError if
        ``quantization_config`` is given, or the configuration asks for what these models lack.
        """
        refuse_quantization(kwargs.get("quantization_config"))
        with mapping(allowed=not kwargs.get("disable_mmap")):
            return super().from_pretrained(*args, **kwargs)  # type: ignore[misc,no-any-return]

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
            **kwargs: As for ``AutoModel.from_config``, whose model too is in training mode.

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

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # The stock method searches the module's source for an attention class that looks up its kernel by name; ours
        # does so in its base class.
        return True
