"""Small models to plan and to measure, and the plan of exactly what is measured."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Size:
    """Of a model and its batch."""

    batch: int
    length: int
    vocab: int
    hidden: int
    layers: int
    heads: int


SMALL = Size(batch=3, length=64, vocab=331, hidden=64, layers=3, heads=4)
KINDS = ("gpt2", "gpt2-inner", "bert-pre", "bert-post", "bert-mlm")


def make_config(kind: str, *, dropout: float = 0.1, size: Size = SMALL) -> Any:
    sizes = {"vocab_size": size.vocab, "max_position_embeddings": size.length, "hidden_size": size.hidden}
    sizes |= {"num_hidden_layers": size.layers, "num_attention_heads": size.heads}
    if kind.startswith("gpt2"):
        inner = {"n_inner": 101, "activation_function": "gelu_pytorch_tanh"} if kind == "gpt2-inner" else {}
        dropouts = {"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout}
        return MegatronGPT2Config(**sizes, **inner, **dropouts, bos_token_id=0, eos_token_id=0)
    return MegatronBertConfig(
        **sizes,
        intermediate_size=4 * size.hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        layernorm_placement="post" if kind == "bert-post" else "pre",
    )


def model_class(kind: str) -> Any:
    if kind.startswith("gpt2"):
        return MegatronGPT2LMHeadModel
    return MegatronBertForMaskedLM if kind == "bert-mlm" else MegatronBertForPreTraining


def make_model(
    kind: str,
    tp_size: int,
    *,
    dropout: float = 0.1,
    sequence_parallel: bool = False,
    size: Size = SMALL,
    **options: Any,
) -> PreTrainedModel:
    config = make_config(kind, dropout=dropout, size=size)
    layout = DistributedConfig(tp_size=tp_size, enable_sequence_parallel=sequence_parallel) if tp_size > 1 else None
    model: PreTrainedModel = model_class(kind).from_config(config, distributed_config=layout, **options)
    return model.train()


def make_shape(kind: str, *, dropout: float = 0.1, size: Size = SMALL) -> ModelShape:
    config = make_config(kind, dropout=dropout, size=size).to_dict()
    return ModelShape.from_config({**config, "architectures": [model_class(kind).__name__]})


def make_run(*, size: Size = SMALL, **changes: Any) -> Run:
    """A run in float32 on a CPU, of the batch that :func:`make_batch` gives."""
    given = {
        "precision": PRECISIONS["fp32"],
        "device": "cpu",
        "micro_batch": size.batch,
        "sequence_length": size.length,
    }
    return Run(**{**given, **changes})


def make_batch(kind: str, size: Size = SMALL) -> dict[str, torch.Tensor]:
    """Token ids and labels; for BERT exactly 15% of the positions are labelled."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocab, (size.batch, size.length), generator=generator)
    if kind.startswith("gpt2"):
        return {"input_ids": ids, "labels": ids}
    labels = torch.full_like(ids, -100)
    chosen = torch.randperm(ids.numel(), generator=generator)[: round(0.15 * ids.numel())]
    labels.view(-1)[chosen] = ids.view(-1)[chosen]
    return {"input_ids": ids, "labels": labels}


def forward(model: Any, kind: str, size: Size = SMALL) -> Any:
    """A training forward pass, of every parameter, without the cache of keys and values that GPT-2 otherwise fills."""
    options: dict[str, Any] = {}
    if kind.startswith("gpt2"):
        options["use_cache"] = False
    elif kind != "bert-mlm":
        options["sentence_order_label"] = torch.zeros(size.batch, dtype=torch.long)
    batch = {name: tensor.to(model.device) for name, tensor in make_batch(kind, size).items()}
    return model(**batch, **options)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_bytes(tensor: torch.Tensor) -> int:
    part = local(tensor)
    return part.numel() * part.element_size()
