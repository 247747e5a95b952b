"""Adapted models that the tests compare: ours at any layout, and stock peft's on the stock model, from one seed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import peft
import torch
from peft import LoraConfig, PeftModel
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from hf_megatron.peft import get_peft_model
from tests.models.architectures import ModelCase
from tests.models.reference import Tensors, full

GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")
BERT_TARGETS = ("query", "key", "value", "dense")


@dataclass(frozen=True)
class Case:
    """A model and its adapter."""

    directory: Path  # where the stock model lies
    architecture: ModelCase
    head: str  # the end of its class's name
    layout: dict[str, int] = field(default_factory=dict)  # of the DistributedConfig; empty for one plain process
    lora: dict[str, Any] = field(default_factory=dict)  # arguments of the LoraConfig
    dtype: torch.dtype = torch.float64

    def at(self, tp_size: int, **sizes: int) -> Self:
        """The same at a layout."""
        return replace(self, layout={"tp_size": tp_size, **sizes} if tp_size > 1 or sizes else {})

    @property
    def config(self) -> LoraConfig:
        """Adapters whose halves are both random; a fresh B is zero, which would hide what happens to A."""
        return LoraConfig(**{"r": 4, "lora_alpha": 7, "init_lora_weights": False, **self.lora})

    @property
    def inputs(self) -> Tensors:
        return self.architecture.inputs(self.head)

    @property
    def labels(self) -> Tensors:
        return self.architecture.labels(self.head)


def our_base(case: Case) -> Any:
    layout = DistributedConfig(**case.layout) if case.layout else None
    model_class = case.architecture.ours(case.head)
    return model_class.from_pretrained(case.directory, dtype=case.dtype, distributed_config=layout)


def our_model(case: Case) -> PeftModel:
    base = our_base(case)
    torch.manual_seed(5)
    return get_peft_model(base, case.config)


def stock_base(case: Case) -> Any:
    return case.architecture.stock(case.head).from_pretrained(case.directory, dtype=case.dtype)


def stock_model(case: Case) -> PeftModel:
    base = stock_base(case)
    torch.manual_seed(5)
    with quiet_peft():
        return peft.get_peft_model(base, case.config)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence what stock peft says about GPT-2's layers and asks of transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def trainable_gradients(model: PeftModel) -> Tensors:
    """Full gradients of what is trained, by name."""
    assert all(parameter.requires_grad == (parameter.grad is not None) for parameter in model.parameters())
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def trainable_weights(model: PeftModel) -> Tensors:
    """Full values of what is trained, by name."""
    return {name: full(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def logits(case: Case, model: PeftModel) -> torch.Tensor:
    """Of the case's inputs, without dropout."""
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**case.inputs).logits
    assert not isinstance(logits, DTensor)
    return logits
