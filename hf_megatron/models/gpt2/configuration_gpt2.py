"""Configuration of the tensor-parallel GPT-2."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

from transformers import GPT2Config

from hf_megatron.architectures import GPT2
from hf_megatron.architectures.presets import preset_named
from hf_megatron.models.configuration import MegatronConfigMixin, tp_plan_of


class MegatronGPT2Config(MegatronConfigMixin, GPT2Config):
    """Configuration with all options of stock GPT2Config except cross-attention, under its own ``model_type``.

    A stock config.json can be loaded directly: ``MegatronGPT2Config.from_pretrained("openai-community/gpt2")``.

    Raises:
        UnsupportedError: ``add_cross_attention=True``, or a hidden size that the heads do not divide.
    """

    model_type = GPT2.model_type
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = tp_plan_of(GPT2, modules=("h.*.attn",))
    # FSDP gathers each block separately; embeddings and the last norm belong to the root.
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {"h.*": "free_full_weight"}

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # the stock type, if the configuration is read from a dictionary
        super().__post_init__(**kwargs)
        GPT2.sizes(vars(self))

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """A model of the paper (``gpt2-8.3b``) or a published one (``gpt2-xl``), with changes (``vocab_size=51200``).

        UnsupportedError if there is no GPT-2 of this name; the message lists those there are.
        """
        return cls(**{**preset_named(name, architecture=GPT2.name).sizes, **changes})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json of this package or of stock GPT-2."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") == GPT2.stock_model_type:
            # Otherwise the instance would have the type "gpt2", after a warning about the wrong type.
            config = {**config, "model_type": GPT2.model_type}
        return config, kwargs
