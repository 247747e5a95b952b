"""Megatron-LM's tensor parallelism for Hugging Face transformers.

Importing the package registers its models with transformers' Auto classes, whichever of the two is imported first.
It imports neither torch nor transformers: the classes are imported when they are asked for.

Source: Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism",
arXiv:1909.08053.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_megatron.after_import import after_import

__version__ = "0.2.0"

__all__ = [
    "MegatronBertConfig",
    "MegatronBertForMaskedLM",
    "MegatronBertForMultipleChoice",
    "MegatronBertForPreTraining",
    "MegatronBertForQuestionAnswering",
    "MegatronBertForSequenceClassification",
    "MegatronBertForTokenClassification",
    "MegatronBertModel",
    "MegatronGPT2Config",
    "MegatronGPT2ForQuestionAnswering",
    "MegatronGPT2ForSequenceClassification",
    "MegatronGPT2ForTokenClassification",
    "MegatronGPT2LMHeadModel",
    "MegatronGPT2Model",
    "MegatronTrainer",
    "__version__",
]

if TYPE_CHECKING:
    from hf_megatron.models import (
        MegatronBertConfig,
        MegatronBertForMaskedLM,
        MegatronBertForMultipleChoice,
        MegatronBertForPreTraining,
        MegatronBertForQuestionAnswering,
        MegatronBertForSequenceClassification,
        MegatronBertForTokenClassification,
        MegatronBertModel,
        MegatronGPT2Config,
        MegatronGPT2ForQuestionAnswering,
        MegatronGPT2ForSequenceClassification,
        MegatronGPT2ForTokenClassification,
        MegatronGPT2LMHeadModel,
        MegatronGPT2Model,
    )
    from hf_megatron.training.trainer import MegatronTrainer


def _register() -> None:
    from hf_megatron.models.configuration import register_configurations

    register_configurations()


# transformers takes seconds to import, and much of this package works without it: AutoConfig is told of our
# configurations as soon as there is an AutoConfig.
after_import("transformers", _register)


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import the classes when they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "hf_megatron.training.trainer" if name == "MegatronTrainer" else "hf_megatron.models"
    return getattr(import_module(module), name)
