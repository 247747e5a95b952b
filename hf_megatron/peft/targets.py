"""Check LoRA configurations and the layers that they target."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import peft
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn

from hf_megatron.errors import UnsupportedError
from hf_megatron.models.heads import VocabParallelHead
from hf_megatron.models.pretrained import MegatronModelMixin
from hf_megatron.peft.lora_layers import ADAPTABLE, ParallelLora
from hf_megatron.tensor_parallel import ParallelModule, VocabParallelEmbedding

# Supported fields of LoraConfig. All other fields, including future ones, must keep their defaults.
_HONOURED = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "bias", "modules_to_save"),
}


@contextmanager
def adapting(model: MegatronModelMixin, config: LoraConfig) -> Iterator[None]:
    """Context in which peft adapts the model's layers: checks the configuration and completes it first."""
    _check_config(config)
    _fill_in(model, config)
    _check_targets(model, config)
    config._register_custom_module({layer: ParallelLora for layer in ADAPTABLE})
    for module in model.modules():  # type: ignore[attr-defined]
        if isinstance(module, ParallelModule):
            module._hf_tp_plan = "megatron"
    with warnings.catch_warnings():
        # peft warns that it cannot shard the adapter (we do it), and uses a deprecated transformers property.
        warnings.filterwarnings("ignore", 'TP plan "megatron"')
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _check_config(config: LoraConfig) -> None:
    if type(config) is not LoraConfig:
        raise UnsupportedError(
            f"{type(config).__name__}: LoRA is the one method that adapts a model that is cut; use peft.LoraConfig."
        )
    default = LoraConfig()
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if field.name not in _HONOURED and value != usual:
            raise UnsupportedError(f"LoraConfig({field.name}={value!r}) is not supported; leave it {usual!r}.")
    if type(config.r) is not int or config.r < 1:
        raise UnsupportedError(f"LoraConfig(r={config.r!r}) is not a rank of 1 or more.")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise UnsupportedError(
            f"init_lora_weights={config.init_lora_weights!r} needs whole weights, which no rank has; use True, False "
            "or 'gaussian'."
        )


def _fill_in(model: MegatronModelMixin, config: LoraConfig) -> None:
    """Set the defaults that peft derives from the type and classes of stock models."""
    named = dict(model.named_modules())  # type: ignore[attr-defined]
    config.fan_in_fan_out = any(getattr(module, "weight_layout", "") == "in_out" for module in named.values())
    if config.target_modules is None:
        config.target_modules = set(DEFAULT_TARGETS[model.architecture.name])
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        heads = ("score", "classifier") if config.task_type == peft.TaskType.SEQ_CLS else ()
        config.target_modules = {
            name.removesuffix(".base_layer")
            for name, module in named.items()
            if isinstance(module, ADAPTABLE) and name not in heads and ".lora_" not in name
        }


def _check_targets(model: MegatronModelMixin, config: LoraConfig) -> None:
    """Reject unsupported targets before any layer is adapted."""
    saved = tuple(config.modules_to_save or ())
    for name, module in model.named_modules():  # type: ignore[attr-defined]
        if isinstance(module, (nn.Embedding, VocabParallelHead)) and check_target_module_exists(config, name):
            raise UnsupportedError(
                f"target_modules: {name} is an embedding or the output head, for which there is no adapter here. "
                "Adapt linear layers ('all-linear' means all of them)."
            )
        is_by_vocabulary = any(isinstance(m, (VocabParallelEmbedding, VocabParallelHead)) for m in module.modules())
        if name.endswith(saved) and saved and is_by_vocabulary:
            raise UnsupportedError(
                f"modules_to_save: {name} is, or holds, the embedding or the output head, which may be one weight. "
                "Leave it out, or train the whole model without an adapter."
            )
