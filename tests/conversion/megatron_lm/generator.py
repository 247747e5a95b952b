"""Megatron-LM checkpoints of small random models, and what Megatron-LM would compute with them.

Nothing here comes from the package. ``make_weights`` makes a model in the terms of the paper: queries, keys and values
of every layer as matrices of their own, nothing cut and nothing padded. ``write`` lays it out as one version or another
of Megatron-LM did, and ``forward`` computes the equations in float64. That two such different descriptions of a model
agree after a conversion is what the tests rest on.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import sys
import types
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]

VOCAB, POSITIONS, HIDDEN, HEADS, LAYERS, FFN = 101, 24, 32, 8, 2, 48
HEAD_DIM = HIDDEN // HEADS


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model as one Megatron-LM would have trained and saved it."""

    kind: str = "gpt"  # or "bert"
    version: float | None = 3.0  # checkpoint_version; None for none
    tp: int = 2
    pp: int = 1
    # first (transformer, attention), second (encoder, self_attention), flat (GPT-2 of 2019), core and te (Megatron-core
    # with its own layers, or transformer-engine's)
    names: str = "second"
    is_post: bool = False  # --apply-residual-connection-post-layernorm
    gelu: str = "erf"  # everywhere; "fused" (tanh in the layers only) or "openai" (tanh everywhere)
    eps: float = 1e-5
    has_binary_head: bool = True  # whether a BERT has its second head, token types and pooler
    is_untied: bool = False  # whether a GPT has a head of its own
    divisor: int = 16  # --make-vocab-size-divisible-by
    has_arguments: bool = True
    is_zip: bool = True  # whether torch 1.6 or later saved it
    dtype: torch.dtype = torch.float32
    chunks: int = 1  # per stage, of an interleaved pipeline
    layers: int = LAYERS
    extra_arguments: tuple[tuple[str, Any], ...] = ()  # besides those of arguments_of, or in their place

    @property
    def is_bert(self) -> bool:
        return self.kind == "bert"

    @property
    def padded_vocab(self) -> int:
        multiple = self.divisor * self.tp
        return math.ceil(VOCAB / multiple) * multiple


def make_weights(variant: Variant, seed: int = 0) -> Tensors:
    """Random weights, every tensor different from all others and large enough for any mistake to show."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return (mean + 0.3 * torch.randn(shape, generator=generator)).to(variant.dtype)

    def affine(name: str, *shape: int, mean: float = 0.0) -> Tensors:
        return {f"{name}.weight": normal(*shape, mean=mean), f"{name}.bias": normal(shape[0])}

    weights = {"words": normal(VOCAB, HIDDEN), "positions": normal(POSITIONS, HIDDEN)}
    for layer in range(variant.layers):
        for norm in ("norm1", "norm2"):
            weights |= affine(f"{layer}.{norm}", HIDDEN, mean=1.0)
        for matrix in ("query", "key", "value", "out"):
            weights |= affine(f"{layer}.{matrix}", HIDDEN, HIDDEN)
        weights |= affine(f"{layer}.up", FFN, HIDDEN) | affine(f"{layer}.down", HIDDEN, FFN)
    weights |= affine("norm", HIDDEN, mean=1.0)
    if variant.is_untied:
        weights["head"] = normal(VOCAB, HIDDEN)
    if variant.is_bert:
        weights |= affine("lm.dense", HIDDEN, HIDDEN) | affine("lm.norm", HIDDEN, mean=1.0)
        weights["lm.bias"] = normal(VOCAB)
    if variant.is_bert and variant.has_binary_head:
        weights["types"] = normal(2, HIDDEN)
        weights |= affine("pooler", HIDDEN, HIDDEN) | affine("binary", 2, HIDDEN)
    return weights


# --- The equations.


def _gelu(is_tanh: bool, x: torch.Tensor) -> torch.Tensor:
    if is_tanh:
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x**2)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def forward(
    variant: Variant, weights: Tensors, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor
) -> list[torch.Tensor]:
    """Logits [B, S, V], and [B, 2] of a BERT with two heads, in float64.

    ``mask`` is [B, S], 1 for real tokens; where it is 0, what comes out is Megatron's and not the stock models'.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = torch.sqrt((centred**2).mean(-1, keepdim=True) + variant.eps)
        return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    length = ids.shape[1]
    if variant.is_bert:
        visible = (mask[:, None, :, None] * mask[:, None, None, :]).bool()
    else:
        visible = torch.ones(length, length).tril().bool()
    x = w["words"][ids] + w["positions"][:length]
    if "types" in w:
        x = x + w["types"][types]
    for layer in range(variant.layers):
        y = norm(x, f"{layer}.norm1")
        heads = [
            linear(y, f"{layer}.{which}").unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for which in ("query", "key", "value")
        ]
        scores = (heads[0] @ heads[1].transpose(2, 3) / math.sqrt(HEAD_DIM)).masked_fill(~visible, -10000.0)
        context = (torch.softmax(scores, dim=-1) @ heads[2]).transpose(1, 2).flatten(2)
        x = (y if variant.is_post else x) + linear(context, f"{layer}.out")
        z = norm(x, f"{layer}.norm2")
        x = (z if variant.is_post else x) + linear(
            _gelu(variant.gelu != "erf", linear(z, f"{layer}.up")), f"{layer}.down"
        )
    x = norm(x, "norm")
    if not variant.is_bert:
        return [x @ w["head" if variant.is_untied else "words"].T]
    hidden = _gelu(variant.gelu == "openai", linear(x, "lm.dense"))
    logits = [norm(hidden, "lm.norm") @ w["words"].T + w["lm.bias"]]
    if variant.has_binary_head:
        logits.append(linear(torch.tanh(linear(x[:, 0], "pooler")), "binary"))
    return logits


# --- The files.


def write(directory: Path, variant: Variant, weights: Tensors | None = None, iteration: int = 1000) -> Path:
    """Write the checkpoint as ``iter_*`` under ``directory``, and return ``directory``."""
    weights = make_weights(variant) if weights is None else weights
    for tp, pp in product(range(variant.tp), range(variant.pp)):
        name = f"mp_rank_{tp:02d}" if variant.pp == 1 else f"mp_rank_{tp:02d}_{pp:03d}"
        path = directory / f"iter_{iteration:07d}/{name}/model_optim_rng.pt"
        save(path, content_of(variant, weights, tp, pp, iteration), variant.is_zip)
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return directory


def save(path: Path, content: Any, is_zip: bool = True) -> None:
    """``torch.save`` as a run on a GPU would write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)


def content_of(variant: Variant, weights: Tensors, tp: int, pp: int, iteration: int = 1000) -> dict[str, Any]:
    """One rank's file."""
    content: dict[str, Any] = {"iteration": iteration}
    per_chunk = variant.layers // (variant.pp * variant.chunks)
    for chunk in range(variant.chunks):
        first = (chunk * variant.pp + pp) * per_chunk
        layers = range(first, first + per_chunk)
        is_first, is_last = first == 0, first + per_chunk == variant.layers
        key = "model" if variant.chunks == 1 else f"model{chunk}"
        flat = flat_state(variant, weights, tp, layers, is_first=is_first, is_last=is_last)
        content[key] = flat if variant.names in ("flat", "core", "te") else _nested(variant, flat)
    if variant.version is not None:
        content["checkpoint_version"] = variant.version
    if variant.has_arguments:
        content["args"] = arguments_of(variant)
    content["random_rng_state"] = random.Random(0).getstate()
    content["np_rng_state"] = np.random.RandomState(0).get_state()
    content["torch_rng_state"] = torch.ByteTensor(16)
    return content


def arguments_of(variant: Variant) -> argparse.Namespace:
    """The arguments of the version, with the names they had then."""
    arguments: dict[str, Any] = {
        "num_layers": variant.layers,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "layernorm_epsilon": variant.eps,
        "make_vocab_size_divisible_by": variant.divisor,
        "padded_vocab_size": variant.padded_vocab,
        "openai_gelu": variant.gelu == "openai",
        "apply_residual_connection_post_layernorm": variant.is_post,
        "hidden_dropout": 0.125,
        "attention_dropout": 0.0625,
        "init_method_std": 0.01,
        "fp16": False,
        "world_size": variant.tp * variant.pp,
    }
    if (variant.version or 0) >= 3:
        arguments |= {
            "ffn_hidden_size": FFN,
            "kv_channels": HEAD_DIM,
            "tensor_model_parallel_size": variant.tp,
            "pipeline_model_parallel_size": variant.pp,
            "bert_binary_head": variant.has_binary_head,
            "untie_embeddings_and_output_weights": variant.is_untied,
            "params_dtype": variant.dtype,
            "vocab_size": None,
        }
    else:
        arguments["model_parallel_size"] = variant.tp
    if variant.gelu == "fused":
        arguments["bias_gelu_fusion"] = True
    return argparse.Namespace(**{**arguments, **dict(variant.extra_arguments)})


def _rows(tensor: torch.Tensor, variant: Variant, tp: int, dim: int = 0) -> torch.Tensor:
    size = tensor.shape[dim] // variant.tp
    return tensor.narrow(dim, tp * size, size).clone()


def _words(tensor: torch.Tensor, variant: Variant, tp: int) -> torch.Tensor:
    """A rank's rows of a table over the vocabulary; the padding is noise, as training leaves it."""
    padding = torch.full((variant.padded_vocab - VOCAB, *tensor.shape[1:]), 7.0, dtype=tensor.dtype)
    return _rows(torch.cat([tensor, padding]), variant, tp)


def _qkv(weights: Tensors, prefix: str, parameter: str, variant: Variant, tp: int) -> torch.Tensor:
    """A rank's fused projection, written row by row in the order of the version."""
    query, key, value = (weights[f"{prefix}.{which}.{parameter}"] for which in ("query", "key", "value"))
    heads = range(tp * HEADS // variant.tp, (tp + 1) * HEADS // variant.tp)
    rows_of = {head: range(head * HEAD_DIM, (head + 1) * HEAD_DIM) for head in heads}
    version = variant.version or 0
    if version < 1:
        rows = [part[row] for part in (query, key, value) for head in heads for row in rows_of[head]]
    elif version < 2:
        rows = [part[row] for head in heads for row in rows_of[head] for part in (query, key, value)]
    else:
        rows = [part[row] for head in heads for part in (query, key, value) for row in rows_of[head]]
    return torch.stack(rows)


_LAYER = {
    "first": ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "core": ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"),
    "second": ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}
_NORMS = {
    **dict.fromkeys(("first", "second"), ("input_layernorm.{}", "post_attention_layernorm.{}")),
    "core": ("input_layernorm.{}", "pre_mlp_layernorm.{}"),
    "te": ("self_attention.linear_qkv.layer_norm_{}", "mlp.linear_fc1.layer_norm_{}"),
}


def flat_state(
    variant: Variant, weights: Tensors, tp: int, layers: range, *, is_first: bool, is_last: bool
) -> dict[str, Any]:
    """The rank's tensors under dotted names without any wrapper."""
    names = {"flat": "first", "te": "core"}.get(variant.names, variant.names)
    qkv, out, up, down = _LAYER[names]
    norms = _NORMS["te" if variant.names == "te" else names]
    is_core = names == "core"
    body = {"first": "transformer", "second": "encoder", "core": "encoder" if variant.is_bert else "decoder"}[names]
    result: dict[str, Any] = {}
    if is_first:
        embedding = "embedding." if is_core else ""
        result[f"{embedding}word_embeddings.weight"] = _words(weights["words"], variant, tp)
        result[f"{embedding}position_embeddings.weight"] = weights["positions"]
        if "types" in weights:
            result[f"{embedding}tokentype_embeddings.weight"] = weights["types"]
    for index, layer in enumerate(layers):
        for parameter in ("weight", "bias"):
            here = f"{body}.layers.{index}."
            result[here + norms[0].format(parameter)] = weights[f"{layer}.norm1.{parameter}"]
            result[f"{here}{qkv}.{parameter}"] = _qkv(weights, f"{layer}", parameter, variant, tp)
            result[here + norms[1].format(parameter)] = weights[f"{layer}.norm2.{parameter}"]
            result[f"{here}{up}.{parameter}"] = _rows(weights[f"{layer}.up.{parameter}"], variant, tp)
        for name, ours in ((out, "out"), (down, "down")):
            result[f"{here}{name}.weight"] = _rows(weights[f"{layer}.{ours}.weight"], variant, tp, 1)
            result[f"{here}{name}.bias"] = weights[f"{layer}.{ours}.bias"]
        if variant.names == "te":
            # Transformer Engine 2 saves a tensor, 1.x what torch.save wrote into memory.
            result[f"{here}{qkv}._extra_state"] = torch.ByteTensor(4)
            result[f"{here}{up}._extra_state"] = io.BytesIO(b"\x80\x02N.")
    if is_last:
        result |= _last_stage(variant, weights, tp, body, is_core=is_core, is_first=is_first)
    return result


def _last_stage(
    variant: Variant, weights: Tensors, tp: int, body: str, *, is_core: bool, is_first: bool
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for parameter in ("weight", "bias"):
        result[f"{body}.final_layernorm.{parameter}"] = weights[f"norm.{parameter}"]
        if variant.is_bert:
            result[f"lm_head.dense.{parameter}"] = weights[f"lm.dense.{parameter}"]
            result[f"lm_head.{'layer_norm' if is_core else 'layernorm'}.{parameter}"] = weights[f"lm.norm.{parameter}"]
        if "types" in weights:
            result[f"pooler.dense.{parameter}"] = weights[f"pooler.{parameter}"]
            result[f"binary_head.{parameter}"] = weights[f"binary.{parameter}"]
    if variant.is_bert:
        result["output_layer.bias" if is_core else "lm_head.bias"] = _words(weights["lm.bias"], variant, tp)
    if variant.is_untied:
        result["output_layer.weight"] = _words(weights["head"], variant, tp)
    elif not is_first:
        copy = "output_layer.weight" if is_core else "word_embeddings_for_head.weight"
        result[copy] = _words(weights["words"], variant, tp)
    return result


def _nested(variant: Variant, flat: dict[str, Any]) -> dict[str, Any]:
    """The nesting of the legacy models: dictionaries by module, of which only the embedding's go one deeper."""
    language_model: dict[str, Any] = {}
    result: dict[str, Any] = {"language_model": language_model}
    for name, tensor in flat.items():
        module, _, rest = name.partition(".")
        if module.endswith("_embeddings"):
            language_model.setdefault("embedding", {}).setdefault(module, {})[rest] = tensor
        elif module in ("encoder", "transformer", "pooler", "output_layer"):
            language_model.setdefault(module, {})[rest] = tensor
        else:
            result.setdefault(module, {})[rest] = tensor
    return result


# --- Objects of classes that are not installed.


def foreign(name: str, **state: Any) -> Any:
    """An instance of a class ``megatron.x.Y`` that exists only while it is pickled."""
    module, _, name = name.rpartition(".")
    instance = type(name, (), {"__module__": module})()
    instance.__dict__.update(state)
    return instance


def save_foreign(path: Path, content: Any, is_zip: bool, *instances: Any) -> None:
    """``save``, while the classes of these instances can be pickled by name."""
    with patch.dict(sys.modules):
        for cls in map(type, instances):
            for name in accumulate(cls.__module__.split("."), "{}.{}".format):
                sys.modules.setdefault(name, types.ModuleType(name))
            setattr(sys.modules[cls.__module__], cls.__name__, cls)
        save(path, content, is_zip)


def inputs(variant: Variant) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and token types, [2, S] each; the second sequence of a BERT's ends in padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2, POSITIONS), generator=generator)
    mask = torch.ones_like(ids)
    types_ = torch.zeros_like(ids)
    if variant.is_bert:
        mask[1, -7:] = 0
        types_[:, POSITIONS // 2 :] = 1 if variant.has_binary_head else 0
    return ids, mask, types_
