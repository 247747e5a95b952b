"""Small models to plan and to measure, and the plan of exactly what is measured."""

from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from hf_megatron.planning import PRECISIONS, ModelShape, Run
from tests.models.architectures import GPT2, POST, PRE, ModelCase
from tests.models.reference import layout


class Size(NamedTuple):
    """Of a model and its batch."""

    batch: int
    length: int
    vocab: int
    hidden: int
    layers: int
    heads: int


SMALL = Size(batch=3, length=64, vocab=331, hidden=64, layers=3, heads=4)
# An architecture, a head, and changes of the configuration.
KINDS: dict[str, tuple[ModelCase, str, dict[str, Any]]] = {
    "gpt2": (GPT2, "LMHeadModel", {}),
    "gpt2-inner": (GPT2, "LMHeadModel", {"n_inner": 101, "activation_function": "gelu_pytorch_tanh"}),
    "bert-pre": (PRE, "ForPreTraining", {}),
    "bert-post": (POST, "ForPreTraining", {}),
    "bert-mlm": (PRE, "ForMaskedLM", {}),
}


def make_config(kind: str, *, dropout: float = 0.1, size: Size = SMALL) -> Any:
    case, _, changes = KINDS[kind]
    sizes = {"vocab_size": size.vocab, "max_position_embeddings": size.length, "hidden_size": size.hidden}
    sizes |= {"num_hidden_layers": size.layers, "num_attention_heads": size.heads}
    inner = {} if case.is_causal else {"intermediate_size": 4 * size.hidden}
    return case.config(**sizes, **inner, **case.dropout(dropout, dropout), **changes)


def make_model(kind: str, tp_size: int, *, dropout: float = 0.1, size: Size = SMALL, **options: Any) -> Any:
    """In training mode; `sequence_parallel` may be one of the options."""
    config = make_config(kind, dropout=dropout, size=size)
    split = layout(tp_size, sequence_parallel=options.pop("sequence_parallel", False))
    case, head, _ = KINDS[kind]
    return case.ours(head).from_config(config, distributed_config=split, **options).train()


def make_shape(kind: str, *, dropout: float = 0.1, size: Size = SMALL) -> ModelShape:
    config = make_config(kind, dropout=dropout, size=size).to_dict()
    case, head, _ = KINDS[kind]
    return ModelShape.from_config({**config, "architectures": [case.ours(head).__name__]})


def make_run(*, size: Size = SMALL, **changes: Any) -> Run:
    """A run in float32 on a CPU, of the batch that :func:`make_batch` gives."""
    batch = {"micro_batch": size.batch, "sequence_length": size.length}
    return Run(**{"precision": PRECISIONS["fp32"], "device": "cpu", **batch, **changes})


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
