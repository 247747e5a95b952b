"""Adapted models that the tests compare: ours at any layout, and stock peft's on the stock model, from one seed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import hf_megatron
from hf_megatron.peft import get_peft_model
from tests.models.bert.reference import make_inputs, make_labels
from tests.models.reference import full, make_batch

Tensors = dict[str, torch.Tensor]

GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")
BERT_TARGETS = ("query", "key", "value", "dense")


@dataclass(frozen=True)
class Case:
    """A model and its adapter.

    Attributes:
        directory: Where the stock model lies.
        stock: Name of the stock class.
        ours: Name of our class.
        layout: Sizes of the DistributedConfig; empty for one plain process.
        lora: Arguments of the LoraConfig.
        dtype: Of the model.
    """

    directory: Path
    stock: str
    ours: str
    layout: dict[str, int] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    @property
    def config(self) -> LoraConfig:
        """Adapters whose halves are both random; a fresh B is zero, which would hide what happens to A."""
        return LoraConfig(**{"r": 4, "lora_alpha": 7, "init_lora_weights": False, **self.lora})

    @property
    def inputs(self) -> Tensors:
        """Ids [3, 9] with padding, a mask, and for BERT token types."""
        if "GPT2" in self.ours:
            return {name: value for name, value in make_batch("right").items() if name != "labels"}
        return make_inputs(self._head)

    @property
    def labels(self) -> Tensors:
        """What the head is trained on."""
        return {"labels": make_batch("right")["labels"]} if "GPT2" in self.ours else make_labels(self._head)

    @property
    def _head(self) -> str:
        return self.ours.removeprefix("MegatronBert")


def our_base(case: Case) -> Any:
    layout = DistributedConfig(**case.layout) if case.layout else None
    model_class = getattr(hf_megatron, case.ours)
    return model_class.from_pretrained(case.directory, dtype=case.dtype, distributed_config=layout)


def our_model(case: Case) -> PeftModel:
    base = our_base(case)
    torch.manual_seed(5)
    return get_peft_model(base, case.config)


def stock_base(case: Case) -> Any:
    return getattr(transformers, case.stock).from_pretrained(case.directory, dtype=case.dtype)


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


def stock_loss(case: Case, model: PeftModel, inputs: Tensors, labels: Tensors) -> torch.Tensor:
    """The stock model's loss in its own dtype; its causal loss casts to float32."""
    if "GPT2" not in case.ours:
        loss: torch.Tensor = model(**inputs, **labels).loss
        return loss
    targets = F.pad(labels["labels"], (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten())


def trainable_gradients(model: PeftModel) -> Tensors:
    """Full gradients of what is trained, by name."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        if parameter.grad is not None:
            gradients[name] = full(parameter.grad)
    return gradients


def trainable_weights(model: PeftModel) -> Tensors:
    """Full values of what is trained, by name."""
    return {name: full(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def logits(case: Case, model: PeftModel) -> torch.Tensor:
    """Of the case's inputs, without dropout."""
    with torch.no_grad():
        output = model.eval()(**case.inputs)
    logits: torch.Tensor = output.logits
    assert not isinstance(logits, DTensor)
    return logits
