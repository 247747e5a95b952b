"""Megatron-LM's forward pass, computed from the shards as they lie in the files.

This restates Megatron's equations rank by rank: each rank multiplies with its own rows and columns, in the order of its
version, and the partial sums are added. It shares with the reader the files and the names, and nothing of how the
reader puts tensors together or fills in a config.json. So where a model converted from these files computes the same,
neither the order of queries, keys and values, nor the cut, nor eps or an activation went wrong on the way.

Shapes: B batch, S sequence, H hidden, t ranks, n heads per rank, d head size, V vocabulary. Everything is float64.

Source: Shoeybi et al. 2019, arXiv:1909.08053; ``megatron/model`` of Megatron-LM v1.0, v2.5 and 23.06.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F

from hf_megatron.architectures.table import ERF_GELUS
from hf_megatron.checkpoint import torch_dtype
from hf_megatron_conversion.formats.megatron_lm import MegatronCheckpoint
from hf_megatron_conversion.formats.megatron_lm.names import has_second_head

Gelu = Callable[[torch.Tensor], torch.Tensor]

_TANH_SCALE = 0.79788456  # as Megatron-LM's kernel has it


def megatron_outputs(
    opened: MegatronCheckpoint, ids: torch.Tensor, token_types: torch.Tensor, dtype: str | None = None
) -> list[torch.Tensor]:
    """What Megatron-LM's GPT or BERT computes for ids [B, S] without padding, and for BERT their token types [B, S].

    The weights are rounded to ``dtype`` first, in safetensors' spelling. Returned are the logits [B, S, V], without
    Megatron-LM's padded words, and for a BERT with both heads also [B, 2].
    """
    return _Forward(opened, dtype).outputs(ids, token_types)


class _Forward:
    def __init__(self, opened: MegatronCheckpoint, dtype: str | None) -> None:
        config, arguments, table = opened.config, opened.arguments, opened.table
        self._opened, self._dtype, self._table, self._sizes = opened, dtype, table, table.sizes(config)
        self._head_dim = self._sizes["hidden_size"] // self._sizes["num_attention_heads"]
        if arguments is None:
            eps = table.epsilon.read(config)  # nothing but the configuration says it
            gelus: list[Gelu] = [_erf_gelu if name in ERF_GELUS else _gelu for name in table.activations(config)]
            self._mlp_gelu, self._head_gelu = gelus
        else:
            eps = arguments.get("layernorm_epsilon", arguments.get("norm_epsilon", 1e-5))
            self._mlp_gelu, self._head_gelu = _gelus(arguments, is_core=opened.is_core)
        self._eps = float(eps)
        self._is_post = table.norms == "post"

    def outputs(self, ids: torch.Tensor, token_types: torch.Tensor) -> list[torch.Tensor]:
        """As :func:`megatron_outputs`."""
        x = self._embed(ids) + self._whole("position_embeddings.weight")[: ids.shape[1]]
        if "tokentype_embeddings.weight" in self._opened.shards:
            x = x + self._whole("tokentype_embeddings.weight")[token_types]
        for layer in range(self._sizes["num_hidden_layers"]):
            x = self._layer(x, f"layers.{layer}")
        x = self._norm(x, "final_layernorm")
        is_tied = self._opened.config["tie_word_embeddings"]
        head = "word_embeddings.weight" if is_tied else "output_layer.weight"
        if "lm_head.dense.weight" not in self._opened.shards:
            return [self._words(x, head, None)]
        transformed = self._norm(self._head_gelu(self._linear(x, "lm_head.dense")), "lm_head.layernorm")
        outputs = [self._words(transformed, head, "lm_head.bias")]
        if has_second_head(self._opened.model_class):
            outputs.append(self._linear(torch.tanh(self._linear(x[:, 0], "pooler.dense")), "binary_head"))
        return outputs

    def _shards(self, name: str) -> Iterator[torch.Tensor]:
        """Each rank's part of a tensor."""
        for shard in self._opened.shards[name]:
            tensor = shard.read()
            yield (tensor if self._dtype is None else tensor.to(torch_dtype(self._dtype))).double()

    def _whole(self, name: str) -> torch.Tensor:
        """A tensor that every rank has; the first one's."""
        return next(self._shards(name))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self._whole(f"{name}.weight"), self._whole(f"{name}.bias"), self._eps)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self._whole(f"{name}.weight"), self._whole(f"{name}.bias"))

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Word embeddings [B, S, H]: each rank looks up the words it has, zeros for the others, and all are added."""
        parts, first = [], 0
        for rows in self._shards("word_embeddings.weight"):
            is_here = (ids >= first) & (ids < first + len(rows))
            parts.append(rows[(ids - first).clamp(0, len(rows) - 1)] * is_here.unsqueeze(-1))
            first += len(rows)
        return torch.stack(parts).sum(dim=0)

    def _words(self, x: torch.Tensor, weight: str, bias: str | None) -> torch.Tensor:
        """Logits [B, S, V]: the ranks' columns side by side, without the padded words at the end."""
        biases = self._shards(bias) if bias is not None else repeat(None)
        parts = [F.linear(x, rows, part) for rows, part in zip(self._shards(weight), biases, strict=False)]
        return torch.cat(parts, dim=-1)[..., : self._sizes["vocab_size"]]

    def _layer(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """One layer: [B, S, H] to [B, S, H]."""
        y = self._norm(x, f"{name}.input_layernorm")
        x = (y if self._is_post else x) + self._attention(y, f"{name}.self_attention")
        z = self._norm(x, f"{name}.post_attention_layernorm")
        return (z if self._is_post else x) + self._mlp(z, f"{name}.mlp")

    def _mlp(self, z: torch.Tensor, name: str) -> torch.Tensor:
        up = zip(self._shards(f"{name}.dense_h_to_4h.weight"), self._shards(f"{name}.dense_h_to_4h.bias"), strict=True)
        hidden = (self._mlp_gelu(F.linear(z, weight, bias)) for weight, bias in up)
        return self._sum_of_ranks(hidden, f"{name}.dense_4h_to_h")

    def _attention(self, y: torch.Tensor, name: str) -> torch.Tensor:
        fused = f"{name}.query_key_value"
        projections = zip(self._shards(f"{fused}.weight"), self._shards(f"{fused}.bias"), strict=True)
        contexts = (self._attend(F.linear(y, weight, bias)) for weight, bias in projections)
        return self._sum_of_ranks(contexts, f"{name}.dense")

    def _attend(self, mixed: torch.Tensor) -> torch.Tensor:
        """Attention of one rank's heads: [B, S, 3 n d] in the order of the version, to [B, S, n d]."""
        *batch, length, width = mixed.shape
        heads, size = width // (3 * self._head_dim), self._head_dim
        if self._opened.version >= 2.0:
            query, key, value = mixed.view(*batch, length, heads, 3, size).unbind(-2)
        elif self._opened.version >= 1.0:
            query, key, value = mixed.view(*batch, length, heads, size, 3).unbind(-1)
        else:
            query, key, value = mixed.view(*batch, length, 3, heads, size).unbind(-3)
        query, key, value = (part.transpose(-2, -3) for part in (query, key, value))  # [B, n, S, d]
        scores = query @ key.transpose(-1, -2) / math.sqrt(size)
        if self._table.is_causal:
            is_future = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(is_future, -10000.0)
        return (scores.softmax(dim=-1) @ value).transpose(-2, -3).reshape(*batch, length, heads * size)

    def _sum_of_ranks(self, parts: Iterable[torch.Tensor], name: str) -> torch.Tensor:
        """A row-parallel layer: the partial sums of all ranks, and its bias once."""
        products = [F.linear(part, weight) for part, weight in zip(parts, self._shards(f"{name}.weight"), strict=True)]
        return torch.stack(products).sum(dim=0) + self._whole(f"{name}.bias")


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(_TANH_SCALE * x * (1.0 + 0.044715 * x * x)))


def _erf_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


def _gelus(arguments: Mapping[str, Any], *, is_core: bool) -> tuple[Gelu, Gelu]:
    """In the layers, and in BERT's head."""
    if is_core:
        return (_gelu if arguments.get("bias_gelu_fusion") else _erf_gelu), _erf_gelu
    head = _gelu if arguments.get("openai_gelu") else _erf_gelu
    is_free = not (arguments.get("openai_gelu") or arguments.get("onnx_safe"))
    # Since it knows more activations than gelu, Megatron-LM fuses only where no variant was asked for.
    is_fused = arguments.get("bias_gelu_fusion") and (is_free or "squared_relu" not in arguments)
    return (_gelu if is_fused else head), head
