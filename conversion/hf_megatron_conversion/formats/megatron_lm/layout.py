"""The tensors of a stock model as Megatron-LM's ranks hold them, under the names of ``names``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hf_megatron.errors import PartitionError
from hf_megatron.partition import Box
from hf_megatron_conversion.formats.base import Target
from hf_megatron_conversion.formats.megatron_lm.arguments import padded_vocab_size
from hf_megatron_conversion.formats.megatron_lm.names import COLUMN, ROW, VOCABULARY, megatron_names, split_layer
from hf_megatron_conversion.formats.megatron_lm.views import Filled, Padded, narrowed, stacked, transposed
from hf_megatron_conversion.tensors import Buffer, Readable, Reshaped, slices_of_bytes

_logger = logging.getLogger(__name__)

DIVISOR = 128
"""Megatron-LM's default for --make-vocab-size-divisible-by."""
# The probability of a padded word is exactly zero with this bias. GPT has none: there a row of zeros adds as little as
# can be added.
_PADDED_BIAS = -10000.0
_QKV = "self_attention.query_key_value"
_TOKEN_TYPES = "tokentype_embeddings.weight"


class Layout:
    """The tensors of every tensor-parallel rank, of all layers.

    Attributes:
        padded_vocab_size: Rows of the word embedding, of all ranks together.
        has_binary_head: Whether a BERT gets its second head, and token types; True for a GPT, as Megatron-LM has it.

    Raises:
        PartitionError: The degree does not divide the heads, or the MLP's size.
    """

    def __init__(self, target: Target) -> None:
        model = target.model
        self._table, self._tensors, self._tp_size = model.table, target.tensors, target.tp_size
        self._sizes = model.table.sizes(model.config)
        heads, intermediate = self._sizes["num_attention_heads"], self._sizes["intermediate_size"]
        if heads % target.tp_size or intermediate % target.tp_size:
            degrees = [n for n in range(1, heads + 1) if heads % n == 0 and intermediate % n == 0]
            raise PartitionError(
                f"num_attention_heads={heads} and intermediate_size={intermediate} are not both divisible by "
                f"tp_size={target.tp_size}, and Megatron-LM has no uneven shards; choose one of "
                f"{', '.join(map(str, degrees[:20]))}."
            )
        self.padded_vocab_size = padded_vocab_size(self._sizes["vocab_size"], DIVISOR, target.tp_size)
        self._stock: dict[str, list[str]] = {}
        for stock, name in megatron_names(model.table, target.tensors, self._sizes["num_hidden_layers"]).items():
            self._stock.setdefault(name, []).append(stock)
        lacks_second_head = _TOKEN_TYPES in self._stock and "binary_head.weight" not in self._stock
        self.has_binary_head = not (lacks_second_head and self._has_no_token_types())
        self._has_empty_head = lacks_second_head and self.has_binary_head
        if self._has_empty_head:
            _logger.warning(
                "The model has token types and no second head, which Megatron-LM's BERT has only both or neither; a "
                "second head of zeros is added."
            )

    def tensors(self, rank: int) -> list[tuple[str, Readable | Reshaped]]:
        """A rank's part of each tensor, the layers in their order."""
        names = sorted(self._stock, key=lambda name: -1 if (layer := split_layer(name)[0]) is None else layer)
        found = [(name, self._shard(name, rank)) for name in names]
        if not self.has_binary_head:
            found = [(name, tensor) for name, tensor in found if name != _TOKEN_TYPES]
        if self._has_empty_head:
            hidden, dtype = self._sizes["hidden_size"], found[0][1].dtype
            for module, rows in (("pooler.dense", hidden), ("binary_head", 2)):
                zeros = {f"{module}.weight": (rows, hidden), f"{module}.bias": (rows,)}
                found += [(name, Filled(dtype, shape)) for name, shape in zeros.items() if name not in self._stock]
        return found

    def _shard(self, name: str, rank: int) -> Readable | Reshaped:
        """A rank's part of one of Megatron's tensors."""
        stored = [self._outwards(stock) for stock in self._stock[name]]
        rest = split_layer(name)[1]
        if rest.startswith(_QKV):
            return self._projections(stored, rank)
        (tensor,) = stored
        if name in VOCABULARY:
            rows = self.padded_vocab_size // self._tp_size
            return Padded(tensor, rank * rows, rows, _PADDED_BIAS if name == "lm_head.bias" else 0.0)
        if rest not in COLUMN and rest not in ROW:
            return tensor
        dim = 0 if rest in COLUMN else 1
        size = tensor.shape[dim] // self._tp_size
        return narrowed(tensor, dim, rank * size, (rank + 1) * size)

    def _outwards(self, stock: str) -> Readable:
        """A stock tensor in Megatron's orientation, matrices [out, in]."""
        tensor = self._tensors[stock]
        return transposed(tensor) if self._table.rule_of(stock).is_transposed else tensor

    def _projections(self, stored: Sequence[Readable], rank: int) -> Reshaped:
        """Queries, keys and values of a rank's heads."""
        hidden = self._sizes["hidden_size"]
        rows = hidden // self._tp_size
        # GPT-2 has the three one after the other in one tensor.
        parts = [(stored[0], which * hidden) for which in range(3)] if len(stored) == 1 else [(t, 0) for t in stored]
        own = [narrowed(tensor, 0, first + rank * rows, first + (rank + 1) * rows) for tensor, first in parts]
        return stacked(own, hidden // self._sizes["num_attention_heads"])

    def _has_no_token_types(self) -> bool:
        (stock,) = self._stock[_TOKEN_TYPES]
        tensor = self._tensors[stock]
        return not any(map(any, slices_of_bytes(tensor, Box.whole(tensor.shape), Buffer())))
