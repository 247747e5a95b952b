"""What our configurations share: the tensor-parallel plan, and the models that become known with them.

Imported together with transformers' ``AutoConfig``, so nothing here imports more than configurations.
"""

from __future__ import annotations

from typing import Any, Self

from hf_megatron.architectures import Architecture

STYLE_NAME = "megatron"


class MegatronConfigMixin:
    """Base of our configurations, beside the stock one they derive from.

    With the first instance the models are imported, which takes seconds, and registered with the Auto classes: who has
    none cannot ask for a model of it.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """As ``object``'s; unpickling and copying pass here too."""
        from hf_megatron.models.registration import register

        register()
        return super().__new__(cls)


def tp_plan_of(table: Architecture, modules: tuple[str, ...] = ()) -> dict[str, str]:
    """The base model's tensor-parallel plan: every module that holds parameters, and those given, which have none."""
    with_parameters = dict.fromkeys(rule.module for rule in table.body)
    return dict.fromkeys((*with_parameters, *modules), STYLE_NAME)


def register_configurations() -> None:
    """Register ``megatron_gpt2`` and ``megatron_bert`` with ``AutoConfig``; models follow with the first instance."""
    from transformers import AutoConfig

    from hf_megatron.models.bert.configuration_bert import ParallelBertConfig
    from hf_megatron.models.gpt2.configuration_gpt2 import MegatronGPT2Config

    for config_class in (ParallelBertConfig, MegatronGPT2Config):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
