"""Small models to plan and to measure, and the plan of exactly what is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from hf_megatron import (
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
    MegatronGPT2Config,
    MegatronGPT2LMHeadModel,
)
from hf_megatron.planning import PRECISIONS, ModelShape, Run

BATCH, LENGTH, VOCAB = 3, 64, 331
KINDS = ("gpt2", "gpt2-inner", "bert-pre", "bert-post", "bert-mlm")


def make_config(kind: str, *, dropout: float = 0.1) -> Any:
    if kind.startswith("gpt2"):
        return MegatronGPT2Config(
            vocab_size=VOCAB,
            n_positions=LENGTH,
            n_embd=64,
            n_layer=3,
            n_head=4,
            n_inner=101 if kind == "gpt2-inner" else None,
            activation_function="gelu_pytorch_tanh" if kind == "gpt2-inner" else "gelu_new",
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    return MegatronBertConfig(
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        layernorm_placement="post" if kind == "bert-post" else "pre",
    )


def model_class(kind: str) -> Any:
    if kind.startswith("gpt2"):
        return MegatronGPT2LMHeadModel
    return MegatronBertForMaskedLM if kind == "bert-mlm" else MegatronBertForPreTraining


def make_model(
    kind: str, tp_size: int, *, dropout: float = 0.1, sequence_parallel: bool = False, **options: Any
) -> PreTrainedModel:
    config = make_config(kind, dropout=dropout)
    layout = DistributedConfig(tp_size=tp_size, enable_sequence_parallel=sequence_parallel) if tp_size > 1 else None
    model: PreTrainedModel = model_class(kind).from_config(config, distributed_config=layout, **options)
    return model.train()


def make_shape(kind: str, *, dropout: float = 0.1) -> ModelShape:
    config = make_config(kind, dropout=dropout).to_dict()
    return ModelShape.from_config({**config, "architectures": [model_class(kind).__name__]})


def make_run(**changes: Any) -> Run:
    """A run in float32 on a CPU, of the batch that :func:`make_batch` gives."""
    given = {"precision": PRECISIONS["fp32"], "device": "cpu", "micro_batch": BATCH, "sequence_length": LENGTH}
    return Run(**{**given, **changes})


def make_batch(kind: str) -> dict[str, torch.Tensor]:
    """Token ids and labels; for BERT exactly 15% of the positions are labelled."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    if kind.startswith("gpt2"):
        return {"input_ids": ids, "labels": ids}
    labels = torch.full_like(ids, -100)
    chosen = torch.randperm(ids.numel(), generator=generator)[: round(0.15 * ids.numel())]
    labels.view(-1)[chosen] = ids.view(-1)[chosen]
    return {"input_ids": ids, "labels": labels}


def forward(model: Any, kind: str) -> Any:
    """A training forward pass, of every parameter, without the cache of keys and values that GPT-2 otherwise fills."""
    options: dict[str, Any] = {}
    if kind.startswith("gpt2"):
        options["use_cache"] = False
    elif kind != "bert-mlm":
        options["sentence_order_label"] = torch.zeros(BATCH, dtype=torch.long)
    return model(**make_batch(kind), **options)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_bytes(tensor: torch.Tensor) -> int:
    part = local(tensor)
    return part.numel() * part.element_size()
