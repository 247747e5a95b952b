"""Configuration of the tensor-parallel BERT."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, ClassVar, Literal, Self

from transformers import BertConfig
from transformers import MegatronBertConfig as StockMegatronBertConfig

from hf_megatron.architectures import BERT_POST, BERT_PRE, Architecture
from hf_megatron.architectures.presets import preset_named
from hf_megatron.errors import UnsupportedError
from hf_megatron.models.configuration import MegatronConfigMixin, tp_plan_of

_TABLES = {"pre": BERT_PRE, "post": BERT_POST}
_STOCK = {BERT_PRE.stock_model_type: ("pre", StockMegatronBertConfig), BERT_POST.stock_model_type: ("post", BertConfig)}


def table_of_placement(placement: str) -> Architecture:
    """The table for a LayerNorm placement, ``pre`` or ``post``; UnsupportedError for another word."""
    if placement not in _TABLES:
        raise UnsupportedError(
            f"layernorm_placement={placement!r}; choose 'pre' (the paper's) or 'post' (the original)."
        )
    return _TABLES[placement]


class ParallelBertConfig(MegatronConfigMixin, BertConfig):
    """Configuration with all options of stock BertConfig and MegatronBertConfig except decoders.

    A stock config.json can be loaded directly; its ``model_type`` determines the placement of the LayerNorms.

    Args:
        layernorm_placement: ``"pre"``, the paper's rearranged BERT, with the parameters of stock MegatronBert; or
            ``"post"``, the original, with the parameters of stock Bert.
        prediction_head_act: Activation in the masked-LM head where it is not ``hidden_act``, which the stock classes
            use in both places. Megatron-LM since 2021 has the tanh form of gelu in its layers and the exact one here.

    Raises:
        UnsupportedError: A decoder, cross-attention, relative positions, or a hidden size that the heads do not divide.
    """

    # transformers looks up model classes by the name of the configuration class and has its own MegatronBertConfig. An
    # Auto class for which there is no model here would then silently return a stock one. The class has another name
    # therefore, and is exported as MegatronBertConfig.
    model_type = BERT_PRE.model_type
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {"encoder.layer.*": "free_full_weight"}

    vocab_size: int = 29056
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    layernorm_placement: Literal["pre", "post"] = "pre"
    prediction_head_act: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        table_of_placement(self.layernorm_placement).sizes(vars(self))

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """The plan for the modules that this placement has."""
        return tp_plan_of(table_of_placement(self.layernorm_placement), modules=("encoder.layer.*.attention.self",))

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """A model of the paper (``bert-3.9b``) or a published one (``bert-base-uncased``), with changes.

        UnsupportedError if there is no BERT of this name; the message lists those there are.
        """
        preset = preset_named(name, architecture=BERT_PRE.name)
        return cls(**{**preset.table.own_config, **preset.sizes, **changes})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json of this package, stock Bert or stock MegatronBert."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") in _STOCK:
            placement, stock_class = _STOCK[config["model_type"]]
            # Missing fields get the defaults of the stock class; they differ between the two classes and from ours.
            defaults = {field.name: field.default for field in dataclasses.fields(stock_class)}
            ours = {field.name for field in dataclasses.fields(cls)}
            sizes = {n: v for n, v in defaults.items() if n in ours and isinstance(v, int) and not isinstance(v, bool)}
            config = {**sizes, **config, "model_type": cls.model_type, "layernorm_placement": placement}
        return config, kwargs


MegatronBertConfig = ParallelBertConfig
