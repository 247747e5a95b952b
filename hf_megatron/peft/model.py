"""Overrides for peft models: collective saving, and gradient averaging over data-parallel ranks."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hf_megatron.checkpoint import AtomicDirectory, read_header, read_json
from hf_megatron.checkpoint.torch_file import open_torch_file
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, HfMegatronError, shown
from hf_megatron.models.processes import is_first_rank, share_failure
from hf_megatron.peft.lora_layers import is_managed_by_fsdp
from hf_megatron.peft.targets import adapting
from hf_megatron.tensor_parallel import ParallelModule, local, parallelize_module


def check_adapter_files(directory: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """Raise a CheckpointError if the files of a local adapter are not what peft takes them for, first."""
    path = Path(directory, subfolder or "")
    if not path.is_dir():
        return  # a name on the Hub
    read_json(path / "adapter_config.json")
    readers: Mapping[str, Callable[[Path], object]] = {
        "adapter_model.safetensors": read_header,
        "adapter_model.bin": open_torch_file,
    }
    found = [name for name in readers if (path / name).exists()]
    if not found:
        raise CheckpointIncompleteError(f"{path} has no {' or '.join(readers)}.")
    for name in found:
        readers[name](path / name)


@contextmanager
def adapter_errors(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what peft raises for values that no adapter has into a CheckpointFormatError."""
    try:
        yield
    except (HfMegatronError, dist.DistError, torch.OutOfMemoryError):
        raise
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError, re.error) as error:
        raise CheckpointFormatError(f"{directory} holds no adapter for this model: {shown(str(error))}.") from error


class _MegatronPeftModel(PeftModel):
    """Methods that override peft's."""

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save the adapters like the stock method; every rank of a sharded model must call it.

        Collective: all-gather over tp of each tensor of an adapter.
        """
        is_collective = self.get_base_model().is_distributed_loading_by_transformers
        if kwargs.get("state_dict") is None:
            kwargs["state_dict"] = self._adapter_tensors()
        is_writer = is_main_process and (is_first_rank() or not is_collective)
        if not is_writer and not is_collective:
            return
        meet = share_failure if is_collective else None
        with AtomicDirectory(save_directory, is_first=is_writer, meet=meet) as fresh:
            if is_writer:
                card = Path(save_directory) / "README.md"
                if card.is_file():
                    shutil.copy(card, fresh.path)  # peft updates an existing model card
                super().save_pretrained(str(fresh.path), *args, **kwargs)
            fresh.publish(merge=True)

    def _adapter_tensors(self) -> dict[str, torch.Tensor]:
        """Gather only the tensors that may belong to an adapter, on the CPU; the stock method gathers everything."""
        has_bias = any(config.bias != "none" for config in self.peft_config.values())
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
            for name, tensor in self.state_dict().items()
            if "lora_" in name or ".modules_to_save." in name or (has_bias and name.endswith("bias"))
        }

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type:
        # Written to adapter_config.json if there is no task type.
        stock: type = getattr(transformers, self.get_base_model()._model_class().stock)
        return stock

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig, *args: Any, **kwargs: Any) -> None:
        """Same as the stock method, for configurations that :func:`hf_megatron.peft.get_peft_model` accepts."""
        with adapting(self.get_base_model(), peft_config):
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        join_data_parallel_ranks(self)

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Same as the stock method, except that missing weights raise a CheckpointIncompleteError."""
        check_adapter_files(model_id, kwargs.get("subfolder"))
        with adapter_errors(model_id):
            result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        if result.missing_keys:
            raise CheckpointIncompleteError(f"the adapter {model_id} lacks {', '.join(result.missing_keys)}.")
        return result


@cache
def with_our_methods(stock: type[PeftModel]) -> type[PeftModel]:
    """The model class of peft for a task, with our methods overriding its own."""
    return type(stock.__name__, (_MegatronPeftModel, stock), {"__doc__": stock.__doc__})


@torch.no_grad()
def join_data_parallel_ranks(model: PeftModel) -> None:
    """Average an adapter's gradients over the data-parallel ranks, as FSDP does for the parameters it manages.

    Collective: all-reduce over fsdp and over dp_replicate, backward, of each of the adapter's gradients.
    """
    mesh_manager: Any = getattr(model.get_base_model(), "_mesh_manager", None)
    meshes = [mesh_manager.get_mesh(name) for name in ("fsdp", "dp_replicate")] if mesh_manager is not None else []
    groups = [mesh.get_group() for mesh in meshes if mesh.size() > 1]
    if not groups:
        return
    for name, module in model.named_modules():
        if ".modules_to_save." in name and isinstance(module, ParallelModule):
            _take_from_fsdp(module, mesh_manager.get_mesh("tp"))
    for parameter in model.parameters():
        if is_managed_by_fsdp(parameter) or hasattr(parameter, "_is_averaged"):
            continue
        needs_gradient = parameter.requires_grad  # False for an inactive adapter
        parameter.requires_grad_(True).register_post_accumulate_grad_hook(partial(_average_gradient, groups))
        parameter.requires_grad_(needs_gradient)
        parameter._is_averaged = True


def _take_from_fsdp(module: ParallelModule, tp_mesh: DeviceMesh) -> None:
    """Replace the FSDP-sharded parameters of a copied module by parameters sharded over tp only.

    Collective: all-gather over fsdp and tp of each.
    """
    parameters: list[tuple[str, Any]] = list(module.named_parameters(recurse=False))
    if not any(is_managed_by_fsdp(parameter) for _, parameter in parameters):
        return
    for name, parameter in parameters:
        module._parameters[name] = nn.Parameter(parameter.full_tensor(), requires_grad=parameter.requires_grad)
    if tp_mesh.size() > 1:
        parallelize_module(module, tp_mesh)


def _average_gradient(groups: list[dist.ProcessGroup], parameter: torch.Tensor) -> None:
    # Earlier accumulated gradients are equal on all ranks, so averaging leaves them unchanged.
    assert parameter.grad is not None, "called when there is one"
    gradient = local(parameter.grad)
    for group in groups:
        dist.all_reduce(gradient, group=group)
        gradient /= group.size()
