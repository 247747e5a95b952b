"""Column-parallel and row-parallel linear layers.

Shapes: B batch, S sequence, H hidden, P ranks; ``in`` and ``out`` are full sizes, ``_p`` marks this rank's part.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from hf_megatron.partition import FusedSplit, Replicated, Spec, Split, chunk_range
from hf_megatron.tensor_parallel import symmetric_memory
from hf_megatron.tensor_parallel.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from hf_megatron.tensor_parallel.group import TensorParallelGroup, like, local, shard_of
from hf_megatron.tensor_parallel.mappings import reduce_from_tensor_parallel_region
from hf_megatron.tensor_parallel.parallel_module import ParallelModule
from hf_megatron.tensor_parallel.sequence_parallel import SequenceParallelRegion, in_region

WeightLayout = Literal["out_in", "in_out"]


class _ParallelLinear(ParallelModule):
    """Base of the two linear layers: the parameters of ``Y = X A + b``.

    Args:
        in_features: Size of X's last dimension over all ranks.
        out_features: Size of Y's last dimension over all ranks.
        bias: Whether there is a ``b``.
        weight_layout: ``"out_in"`` stores ``A`` transposed, as ``nn.Linear`` does; ``"in_out"`` as it is, as GPT-2's
            Conv1D does.
        specs: The cut of ``weight`` and ``bias``, if it is not the usual one of the class.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    _usual_specs: ClassVar[Mapping[WeightLayout, Mapping[str, Spec]]]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        weight_layout: WeightLayout = "out_in",
        specs: Mapping[str, Spec] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_layout = weight_layout
        shape = (in_features, out_features) if weight_layout == "in_out" else (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        self._specs = dict(specs or self._usual_specs[weight_layout])
        if not self.weight.is_meta:  # where torch takes milliseconds for nothing, while a model is loaded
            nn.init.normal_(self.weight, std=0.02)  # as in GPT-2 and BERT; models initialize it once more

    def partition_specs(self) -> Mapping[str, Spec]:
        return self._specs

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return ", ".join(part for part in (sizes, super().extra_repr()) if part)


class ColumnParallelLinear(_ParallelLinear):
    """Column-parallel ``Y = X A + b``: ``A = [A_1, ..., A_P]``, and rank i computes ``Y_i = X A_i + b_i``.

    Both are cut along ``out``. By its spec a bias may be held whole, if each rank uses a part of it
    (``Replicated(used=FusedSplit(...))``).
    """

    _usual_specs: ClassVar = {
        "in_out": {"weight": Split(1), "bias": Split(0)},
        "out_in": {"weight": Split(0), "bias": Split(0)},
    }

    @property
    def _bias_blocks(self) -> int:
        """Blocks of a bias that is held whole; 0 if it is cut, or there is none."""
        spec = self._specs.get("bias") if self.bias is not None else None
        used = spec.used if isinstance(spec, Replicated) else None
        return used.num_blocks if isinstance(used, FusedSplit) else 0

    def forward(self, x: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """[..., in] to [..., out_p]: replicated, or with a region [S_p, ..., in], split on dim 0, to split on the last.

        Collective: that of :func:`column_parallel_linear`.
        """
        return column_parallel_linear(x, region, self)[0]


def column_parallel_linear(
    x: torch.Tensor, region: SequenceParallelRegion | None, *layers: ColumnParallelLinear
) -> tuple[torch.Tensor, ...]:
    """Apply column-parallel layers to one input behind a single *f*: ``Y_i = f(X) A_i + b_i`` for each layer.

    Args:
        x: [..., in], replicated; with a region [S_p, ..., in], split on dim 0, the sequence.
        region: Where x comes from, if it is split on the sequence.
        layers: Layers of one weight layout; one whose bias is held whole comes alone.

    Returns:
        For each layer [..., out_p], split on the last dim.

    Collective: one for all layers, while the gradients of the weights are computed: all-reduce over tp, backward, of
    x's gradient, and of that of a bias that is held whole. With a region all-gather over tp, forward, and all-gather
    and reduce-scatter over tp, backward: of the input only this rank's positions are kept for the backward pass.
    """
    group, layout, blocks = layers[0].tp_group, layers[0].weight_layout, layers[0]._bias_blocks
    where = region if blocks else None  # a bias that is split sees all positions, and its gradient is whole
    if group.size == 1 or not torch.is_grad_enabled():
        x = x if region is None else region.enter(x)
        return tuple(_product(x, local(layer.weight), _used_bias(layer, where), layout) for layer in layers)
    x = _cast(x, _autocast_dtype(x))
    if region is not None and symmetric_memory.is_used(group, x, region.length):
        matrices = [_matrix(layer, x.dtype) for layer in layers]
        matrix = matrices[0] if len(layers) == 1 else torch.cat(matrices, dim=1)
        product = symmetric_memory.gather_and_multiply(group, x, matrix)
        parts = [product] if len(layers) == 1 else product.split([m.shape[1] for m in matrices], dim=-1)
        biases = [_used_bias(layer, where) for layer in layers]
        return tuple(part if b is None else part + b.to(x.dtype) for part, b in zip(parts, biases, strict=True))
    weights = [_for_function(layer.weight) for layer in layers]
    if blocks and region is not None:  # see `SequenceParallelRegion.sharing`
        biases, blocks = [_used_bias(layer, where) for layer in layers], 0
    else:
        biases = [None if layer.bias is None else _for_function(layer.bias) for layer in layers]
    entry = _Entry(group, layout, None if region is None else region.length, blocks)
    products: tuple[torch.Tensor, ...] = _ColumnParallelLinear.apply(x, entry, *weights, *biases)
    return products


def _used_bias(layer: ColumnParallelLinear, region: SequenceParallelRegion | None) -> torch.Tensor | None:
    """A layer's bias [out_p], split on dim 0, also if it is held whole; a plain tensor."""
    if layer.bias is None:
        return None
    bias = in_region(layer.bias, region)
    return _part_of_bias(bias, layer.tp_group, layer._bias_blocks).reshape(-1) if layer._bias_blocks else bias


class RowParallelLinear(_ParallelLinear):
    """Row-parallel ``Y = X A + b``, with the rows of ``A`` and the columns of ``X`` split: ``Y = sum_i X_i A_i + b``.

    The bias is replicated and part of the first rank's term of the sum, which saves a pass over the output.
    """

    sees_whole_sequence = True
    _usual_specs: ClassVar = {
        "in_out": {"weight": Split(0), "bias": Replicated()},
        "out_in": {"weight": Split(1), "bias": Replicated()},
    }

    def forward(self, x: torch.Tensor, region: SequenceParallelRegion | None = None) -> torch.Tensor:
        """[..., in_p], split on the last dim, to [..., out], replicated; with a region to [S_p, ..., out], split on 0.

        Collective: all-reduce over tp, forward, of the output. With a region reduce-scatter over tp, forward, and
        all-gather over tp, backward.
        """
        if self.tp_group.size == 1:
            return _product(x, local(self.weight), None if self.bias is None else local(self.bias), self.weight_layout)
        x = _cast(x, _autocast_dtype(x))
        if region is not None and symmetric_memory.is_used(self.tp_group, x, region.length):
            bias = None if self.bias is None else local(self.bias).to(x.dtype)
            return symmetric_memory.multiply_and_reduce_scatter(self.tp_group, x, _matrix(self, x.dtype), bias)
        weight, bias = _for_function(self.weight), None if self.bias is None else _for_function(self.bias)
        term = _RowParallelProduct.apply(x, weight, bias, self)
        if region is not None:
            return region.leave(term)
        return reduce_from_tensor_parallel_region(self.tp_group, term, in_place=True)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layout: WeightLayout) -> torch.Tensor:
    """``x @ A + bias`` with local tensors; ``A`` is [in, out], or stored transposed."""
    if layout == "out_in":
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    product = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return product.view(*x.shape[:-1], weight.shape[1])


def _matrix(layer: _ParallelLinear, dtype: torch.dtype) -> torch.Tensor:
    """This rank's part of ``A`` [in, out], whichever way it is stored; a plain tensor."""
    weight = local(layer.weight).to(dtype)
    return weight if layer.weight_layout == "in_out" else weight.t()


def _for_function(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter as the functions below take it: as it is, or local for a compiler, which does not see into it."""
    return local(parameter) if torch.compiler.is_compiling() else parameter


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """To what autocast would cast the arguments of a product with ``x``; it does not cast those of custom functions."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else None


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _part_of_bias(whole: torch.Tensor, group: TensorParallelGroup, blocks: int) -> torch.Tensor:
    """View [blocks, out_p / blocks] of the part of a replicated bias [out] that this rank uses."""
    rows = whole.view(blocks, -1)
    return rows[:, slice(*chunk_range(rows.shape[1], group.size, group.rank))]


# The functions take parameters that may be DTensors, and return gradients of the same kind: an own step from the one to
# the other would take as long on the host as a layer norm.


class _Entry(NamedTuple):
    """How an input enters a parallel region."""

    group: TensorParallelGroup  # of more than one rank
    layout: WeightLayout  # how the weights are stored
    length: int | None  # S, if the input is split on the sequence; None if it is replicated
    bias_blocks: int  # of a single bias that is held whole; 0 if biases are split


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, entry: _Entry, *weights_and_biases: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.entry, ctx.shape, ctx.count = entry, x.shape, len(weights_and_biases) // 2
        ctx.parameters = weights_and_biases
        ctx.num_whole_bias = weights_and_biases[-1].numel() if entry.bias_blocks else 0
        shards = [None if p is None else shard_of(p) for p in weights_and_biases]
        weights, biases = [_cast(w, x.dtype) for w in shards[: ctx.count]], shards[ctx.count :]
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2 : 2 + ctx.count]) else None, *weights)
        if entry.length is not None:
            x = start_all_gather(entry.group, x, 0, entry.length, is_async=False)()
        if entry.bias_blocks:
            biases = [_part_of_bias(bias, entry.group, entry.bias_blocks).reshape(-1) for bias in biases]
        return tuple(_product(x, weight, bias, entry.layout) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        entry, (x, *weights) = ctx.entry, ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        needs_weights, needs_biases = needs[: ctx.count], needs[ctx.count :]
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]  # [T, out_p]
        again = None  # the full input; only this rank's positions were saved
        if entry.length is not None and any(needs_weights):
            again = start_all_gather(entry.group, x, 0, entry.length)
        has_whole_bias = bool(entry.bias_blocks) and needs_biases[0]
        shape = (*gradients[0].shape[:-1], ctx.shape[-1] if needs_x else 0)
        # A new buffer for the in-place all-reduce: the partial sum of the gradient of x, followed by that of a
        # replicated bias.
        buffer = flat[0].new_empty(math.prod(shape) + (ctx.num_whole_bias if has_whole_bias else 0))
        of_x, of_whole_bias = buffer[: math.prod(shape)].view(shape), buffer[math.prod(shape) :]
        if needs_x:
            for i, (gradient, weight) in enumerate(zip(flat, weights, strict=True)):
                matrix = weight if entry.layout == "out_in" else weight.t()
                of_x.view(-1, shape[-1]).addmm_(gradient, matrix, beta=min(i, 1))
        if has_whole_bias:
            part = _part_of_bias(of_whole_bias.zero_(), entry.group, entry.bias_blocks)
            part.copy_(flat[0].sum(0).view(part.shape))
        wait: Callable[[], Any] | None = None
        if entry.length is None and buffer.numel():
            wait = start_all_reduce(entry.group, buffer)
        elif needs_x and entry.length is not None:
            wait = start_reduce_scatter(entry.group, of_x, 0)
        # Overlaps with the all-reduce.
        results: list[Any] = [None] * len(needs)
        if any(needs_weights):
            rows = (x if again is None else again()).reshape(-1, ctx.shape[-1])
            products = ((g.t(), rows) if entry.layout == "out_in" else (rows.t(), g) for g in flat)
            pairs = zip(products, needs_weights, strict=True)
            results[: ctx.count] = [left @ right if is_needed else None for (left, right), is_needed in pairs]
        if not has_whole_bias:
            sums = zip(flat, needs_biases, strict=True)
            results[ctx.count :] = [gradient.sum(0) if is_needed else None for gradient, is_needed in sums]
        if wait is not None:
            total = wait()
            of_x = of_x if entry.length is None else total
        if has_whole_bias:
            results[-1] = of_whole_bias.clone()  # a view would keep the whole buffer alive as long as the gradient
        of_parameters = [
            None if g is None else like(p, g.to(p.dtype)) for p, g in zip(ctx.parameters, results, strict=True)
        ]
        return of_x if needs_x else None, None, *of_parameters


class _RowParallelProduct(torch.autograd.Function):
    """This rank's term of the sum. What follows saves nothing, so that recomputation can leave out the collective."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: RowParallelLinear
    ) -> torch.Tensor:
        ctx.layout, ctx.parameters = layer.weight_layout, (weight, bias)
        shard = _cast(shard_of(weight), x.dtype)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, shard)
        term = _cast(shard_of(bias), x.dtype) if bias is not None and layer.tp_group.rank == 0 else None
        return _product(x, shard, term, ctx.layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight), parameters = ctx.saved_tensors, ctx.parameters
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])  # [T, out], replicated
        of_x = of_weight = None
        if needs_x:
            of_x = (flat @ (weight if ctx.layout == "out_in" else weight.t())).view(*gradient.shape[:-1], -1)
        if needs_weight:
            rows = x.reshape(-1, x.shape[-1])  # [T, in_p]
            product = flat.t() @ rows if ctx.layout == "out_in" else rows.t() @ flat
            of_weight = like(parameters[0], product.to(parameters[0].dtype))
        of_bias = like(parameters[1], flat.sum(0).to(parameters[1].dtype)) if needs_bias else None
        return of_x, of_weight, of_bias, None
