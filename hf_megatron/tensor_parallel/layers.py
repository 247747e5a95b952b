"""Linear layers and embeddings that are cut over the ranks of a tensor-parallel group.

Every parameter keeps its full, unsharded shape and name: on one rank it is an ordinary tensor, on several a DTensor
whose placement says how it is cut. The forward pass runs on this rank's part, with the communication written out.

Shapes: B batch, S sequence, H hidden, P ranks; ``in`` and ``out`` are full sizes, ``_p`` marks this rank's part.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from hf_megatron.errors import UnsupportedError
from hf_megatron.partition import Replicated, Spec, Split, VocabSplit, chunk_range
from hf_megatron.tensor_parallel.group import SINGLE, TensorParallelGroup, local
from hf_megatron.tensor_parallel.mappings import (
    reduce_from_tensor_parallel_region,
)
from hf_megatron.tensor_parallel.products import copied_products
from hf_megatron.tensor_parallel.sequence_parallel import SequenceParallelRegion
from hf_megatron.tensor_parallel.tied import sparse_lookup, tied_rows

WeightLayout = Literal["out_in", "in_out"]


class ParallelModule(nn.Module):
    """A module that knows its tensor-parallel group and how its own parameters are cut.

    Attributes:
        tp_group: The group; one rank until :meth:`set_tensor_parallel` is called.
    """

    tp_group: TensorParallelGroup = SINGLE

    @cached_property
    def _hf_tp_plan(self) -> str:
        # What peft asks of a layer before it adapts it; hf_megatron.peft has put an answer here by then. It would take
        # a replicated layer or an embedding for the stock one it derives from.
        raise UnsupportedError(
            f"peft cannot tell how a {type(self).__name__} is cut over the ranks. Call hf_megatron.peft.get_peft_model "
            "in place of peft.get_peft_model, and hf_megatron.peft.load_adapter in place of PeftModel.from_pretrained."
        )

    def partition_specs(self) -> Mapping[str, Spec]:
        """The cut of each own parameter; parameters that are not named are replicated."""
        return {}

    def set_tensor_parallel(self, group: TensorParallelGroup) -> None:
        """Take part in ``group`` from now on. The parameters are cut separately, see ``style``."""
        self.tp_group = group

    def extra_repr(self) -> str:
        """What the base class says, and the place in the group."""
        place = f"tp_size={self.tp_group.size}, tp_rank={self.tp_group.rank}" if self.tp_group.size > 1 else ""
        return ", ".join(part for part in (super().extra_repr(), place) if part)


class _ParallelLinear(ParallelModule):
    """What the two linear layers share: the parameters and the local matrix product."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        weight_layout: WeightLayout,
        specs: Mapping[str, Spec],
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_layout = weight_layout
        shape = (in_features, out_features) if weight_layout == "in_out" else (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self._specs = dict(specs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from N(0, 0.02), bias zero, as in GPT-2 and BERT; models draw theirs anew."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def partition_specs(self) -> Mapping[str, Spec]:
        return self._specs

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ A + bias`` with local tensors; ``A`` is [in, out] or stored transposed."""
        if self.weight_layout == "out_in":
            return F.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        product = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return product.view(*x.shape[:-1], weight.shape[1])

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return ", ".join(part for part in (sizes, super().extra_repr()) if part)


class ColumnParallelLinear(_ParallelLinear):
    """``Y = X A + b`` with the columns of ``A`` cut: ``A = [A_1, ..., A_P]``, so rank i computes ``Y_i = X A_i + b_i``.

    Args:
        in_features: Size of X's last dimension.
        out_features: Size of Y's last dimension over all ranks.
        bias: Whether there is a ``b``.
        weight_layout: ``"out_in"`` stores ``A`` transposed, as ``nn.Linear`` does; ``"in_out"`` as it is, as GPT-2's
            Conv1D does.
        specs: The cut of ``weight`` and ``bias``; both along ``out`` by default.
        is_input_copied: The caller has taken x through ``copy_to_tensor_parallel_region`` already, for several layers
            at once, so that their gradients of x share one all-reduce.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        weight_layout: WeightLayout = "out_in",
        specs: Mapping[str, Spec] | None = None,
        is_input_copied: bool = False,
    ) -> None:
        default = {"weight": Split(1 if weight_layout == "in_out" else 0), "bias": Split(0)}
        super().__init__(in_features, out_features, bias=bias, weight_layout=weight_layout, specs=specs or default)
        self.is_input_copied = is_input_copied
        assert not (is_input_copied and self._bias_is_sliced), "a bias held whole goes through f with the input"

    @property
    def _bias_is_sliced(self) -> bool:
        """Whether the bias is held whole, and each rank uses a part of it."""
        spec = self._specs.get("bias")
        return self.bias is not None and isinstance(spec, Replicated) and spec.used is not None

    def forward(self, x: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """Multiply by this rank's columns.

        Args:
            x: [..., in], replicated; with a region [..., S_p, in], split on the sequence.
            region: Where x comes from, if it is split on the sequence.

        Returns:
            [..., out_p], split on the last dim.

        Collective: all-reduce over tp, backward, of x's gradient, unless ``is_input_copied``; a bias that is held whole
        sends its gradient along. With a region, those of :func:`column_products`.
        """
        if region is None and self.is_input_copied:
            return self._multiply(x, local(self.weight), None if self.bias is None else local(self.bias))
        return column_products(x, region, self)[0]

    def bias_part(self, region: SequenceParallelRegion | None) -> torch.Tensor | None:
        """[out_p], split: this rank's part of the bias, if there is one."""
        if self.bias is None:
            return None
        if not self._bias_is_sliced or self.tp_group.size == 1:
            return local(self.bias)
        return self._part(_used(self.bias, region))

    def bias_index(self, device: torch.device) -> torch.Tensor | None:
        """[out_p], which elements of the bias are this rank's, if it is held whole."""
        return self._part(torch.arange(self.out_features, device=device)) if self._bias_is_sliced else None

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        return cast(Replicated, self._specs["bias"]).part(whole, self.tp_group.size, self.tp_group.rank)


def column_products(
    x: torch.Tensor, region: SequenceParallelRegion | None, *layers: ColumnParallelLinear
) -> tuple[torch.Tensor, ...]:
    """Several column-parallel layers on one input, which share the communication.

    Args:
        x: [..., in], replicated; with a region [..., S_p, in], split on the sequence.
        region: Where x comes from, if it is split on the sequence.
        layers: Layers of one weight layout; a bias that is held whole has a single one.

    Returns:
        For each layer [..., out_p], split on the last dim.

    Collective: one for all layers: all-reduce over tp, backward, of x's gradient. With a region all-gather over tp,
    forward, and all-gather and reduce-scatter over tp, backward.
    """
    group, weights = layers[0].tp_group, [local(layer.weight) for layer in layers]
    is_transposed = layers[0].weight_layout == "out_in"
    if region is None and group.size > 1 and torch.is_grad_enabled():
        biases = [None if layer.bias is None else local(layer.bias) for layer in layers]
        index = layers[0].bias_index(x.device)
        return copied_products(group, x, weights, biases, is_transposed=is_transposed, bias_index=index)
    biases = [layer.bias_part(region) for layer in layers]
    if region is None:
        return tuple(
            layer._multiply(x, weight, bias) for layer, weight, bias in zip(layers, weights, biases, strict=True)
        )
    products = region.enter_products(x, weights, is_transposed=is_transposed)
    return tuple(product if bias is None else product + bias for product, bias in zip(products, biases, strict=True))


class RowParallelLinear(_ParallelLinear):
    """``Y = X A + b`` with the rows of ``A`` and the columns of ``X`` cut: ``Y = sum_i X_i A_i + b``.

    The bias is replicated and added once, after the sum.

    Args:
        in_features: Size of X's last dimension over all ranks.
        out_features: Size of Y's last dimension.
        bias: Whether there is a ``b``.
        weight_layout: As in :class:`ColumnParallelLinear`.
        specs: The cut of ``weight`` and ``bias``; by default ``weight`` along ``in`` and ``bias`` replicated.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        weight_layout: WeightLayout = "out_in",
        specs: Mapping[str, Spec] | None = None,
    ) -> None:
        default = {"weight": Split(0 if weight_layout == "in_out" else 1), "bias": Replicated()}
        super().__init__(in_features, out_features, bias=bias, weight_layout=weight_layout, specs=specs or default)

    def forward(self, x: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """Multiply by this rank's rows and sum over the ranks.

        Args:
            x: [..., in_p], split on the last dim.
            region: Where the output goes to, if that is split on the sequence.

        Returns:
            [..., out], replicated; with a region [..., S_p, out], split on the sequence.

        Collective: all-reduce over tp, forward, of the output. With a region reduce-scatter over tp, forward, and
        all-gather over tp, backward.
        """
        weight = local(self.weight)
        bias = None if self.bias is None else _used(self.bias, region)
        if self.tp_group.size == 1:
            return self._multiply(x, weight, bias)
        partial_sum = self._multiply(x, weight, None)
        if region is None:
            product = reduce_from_tensor_parallel_region(self.tp_group, partial_sum)
        else:
            product = region.leave(partial_sum)
        return product if bias is None else product + bias


class VocabParallelEmbedding(ParallelModule, nn.Embedding):
    """Embedding whose rows, the vocabulary, are cut: each rank looks up its own tokens, and the sum is everybody's.

    ``num_embeddings`` and ``padding_idx`` are global. No rank but the one that holds the padding row may freeze a row
    for it, and a token of another rank must not reach the padding row's gradient.
    """

    _shared_rows: torch.Tensor | None = None

    def partition_specs(self) -> Mapping[str, Spec]:
        return {"weight": VocabSplit()}

    def forward(self, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Look up the embeddings.

        Args:
            input_ids: [B, S] global token ids, replicated. None gives the weight itself, for a tied head: hooks that
                bring weights when they are needed work on calls.

        Returns:
            [B, S, H], replicated; or the weight [V, H], split on dim 0.

        Collective: all-reduce over tp, forward, of the output.
        """
        if input_ids is None:
            return self.weight
        group = self.tp_group
        if group.size == 1:
            return self._look_up(input_ids, self.padding_idx)
        start, stop = chunk_range(self.num_embeddings, group.size, group.rank)
        self._check_range(input_ids)
        is_mine = (input_ids >= start) & (input_ids < stop)
        padding = self.padding_idx
        local_padding = padding - start if padding is not None and start <= padding < stop else None
        embedded = self._look_up(torch.where(is_mine, input_ids - start, 0), local_padding)
        # Row 0 stood in for the tokens of other ranks; zeroing the output keeps their gradients out of it.
        return reduce_from_tensor_parallel_region(group, embedded.masked_fill(~is_mine[..., None], 0.0))

    def _look_up(self, rows: torch.Tensor, padding: int | None) -> torch.Tensor:
        if self._shared_rows is not None:
            return sparse_lookup(self._shared_rows, rows, padding)
        return F.embedding(rows, local(self.weight), padding)

    @contextmanager
    def sharing_gradient(self) -> Iterator[torch.Tensor]:
        """Within it, lookups add their gradients to that of a head with the same weight, of which they are a few rows.

        Otherwise they would fill a gradient of their own, mostly with zeros, for autograd to add. On a CPU that takes
        as long as a layer.

        Yields:
            The weight for the head [V_p, H], split on dim 0.
        """
        self._shared_rows, for_head = tied_rows(local(self.weight))
        try:
            yield for_head
        finally:
            self._shared_rows = None

    def _check_range(self, input_ids: torch.Tensor) -> None:
        # An id outside of the vocabulary belongs to no shard and would silently embed as zero; one rank raises.
        if input_ids.is_cuda or torch.compiler.is_compiling():
            in_range = ((input_ids >= 0) & (input_ids < self.num_embeddings)).all()
            torch._assert_async(in_range, "a token id is outside of the vocabulary")
        elif input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < self.num_embeddings:
            raise IndexError(
                f"token ids from {int(input_ids.min())} to {int(input_ids.max())} were given, but the embedding has "
                f"{self.num_embeddings} rows; check that the tokenizer belongs to this model."
            )


class ReplicatedLinear(ParallelModule, nn.Linear):
    """``nn.Linear`` that every rank holds whole, for small heads. Input and output are replicated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], both replicated, without communication."""
        return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))


class ReplicatedEmbedding(ParallelModule, nn.Embedding):
    """``nn.Embedding`` that every rank holds whole, for positions and token types."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[...] ids to [..., H], both replicated, without communication."""
        return F.embedding(input_ids, local(self.weight), self.padding_idx)


class ReplicatedLayerNorm(ParallelModule, nn.LayerNorm):
    """``nn.LayerNorm`` that every rank holds whole."""

    def forward(self, x: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """[..., H] to [..., H], both replicated or, with a region, both split on the sequence; no communication."""
        bias = cast("torch.Tensor | None", self.bias)
        weight, bias = _used(self.weight, region), None if bias is None else _used(bias, region)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class HiddenDropout(nn.Dropout):
    """``nn.Dropout`` on hidden states, with the same mask whether they are replicated or split on the sequence."""

    def forward(self, x: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """[..., H] to [..., H], both replicated or, with a region, both split on the sequence; no communication."""
        if region is None or not self.training or not self.p:
            return super().forward(x)
        return region.dropout(x, self.p)


def replicated_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those of a module's parameters that every rank holds whole, in the order of its submodules."""
    for child in module.modules():
        if isinstance(child, ParallelModule):
            specs = child.partition_specs()
            for name, parameter in child._parameters.items():
                if parameter is not None and isinstance(specs.get(name, Replicated()), Replicated):
                    yield parameter


def _used(parameter: torch.Tensor, region: SequenceParallelRegion | None) -> torch.Tensor:
    """A parameter that is held whole, as a plain tensor to compute with."""
    return local(parameter) if region is None else region.parameter(parameter)
