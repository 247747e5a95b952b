"""Random numbers that do not depend on the tensor-parallel degree.

All random numbers come from torch's default CPU generator, which has the same state on all ranks of a tensor-parallel
group. Outside of parallel regions, activations are replicated, and ordinary dropout draws the same mask on every rank.
Inside, each rank holds different heads: each call draws one seed from the generator, and every *global* head derives
its own sub-seed from it. A head therefore gets the same mask on any rank, at any degree.

With sequence parallelism, each rank draws the mask of the whole sequence and keeps its part, so the random state and
the masks are the same as without it.

Trainer saves the default generator, ``torch.utils.checkpoint`` replays it and ``torch.manual_seed`` seeds it, so
resuming, recomputation and reproducibility need no additional state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hf_megatron.partition import chunk_range
from hf_megatron.tensor_parallel.group import TensorParallelGroup

# Sub-seeds are seed + head and must stay within the range of torch.Generator.
_MAX_SEED = 2**62


def attention_dropout(probabilities: torch.Tensor, p: float, first_head: int) -> torch.Tensor:
    """Dropout on attention probabilities [B, N_p, S_q, S_k], split by heads, with one mask per global head.

    ``first_head`` is the global index of this rank's first head.
    """
    if p == 0.0:
        return probabilities
    if p == 1.0:
        return probabilities * 0.0
    seed = torch.randint(_MAX_SEED, ())
    keep: torch.Tensor = _attention_keep_mask(probabilities.detach(), seed, p, first_head)
    return probabilities * keep * (1.0 / (1.0 - p))


def sliced_dropout(group: TensorParallelGroup, x: torch.Tensor, p: float, *, dim: int, size: int) -> torch.Tensor:
    """Dropout on activations that are split on ``dim``; the mask equals that of one rank for the full tensor.

    Each rank draws the whole mask and keeps its slice, as ``torch.chunk`` cuts ``size``.
    """
    shape = list(x.shape)
    shape[dim] = size
    start, stop = chunk_range(size, group.size, group.rank)
    # Drawn by dropout itself and in x's dtype, as the generator's numbers depend on the kernel on a GPU.
    is_kept = F.dropout(x.new_ones(shape), p).narrow(dim, start, stop - start) != 0
    return x * is_kept * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


@torch.library.custom_op("hf_megatron::attention_keep_mask", mutates_args=())
def _attention_keep_mask(like: torch.Tensor, seed: torch.Tensor, p: float, first_head: int) -> torch.Tensor:
    """Mask of elements to keep: bool, shaped like ``like`` [B, N_p, ...]. A custom op, opaque to torch.compile."""
    mask = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    generator = torch.Generator(device=like.device)
    for head in range(like.shape[1]):
        generator.manual_seed(int(seed) + first_head + head)
        mask[:, head] = torch.empty_like(mask[:, head]).bernoulli_(1.0 - p, generator=generator)
    return mask


@_attention_keep_mask.register_fake
def _(like: torch.Tensor, seed: torch.Tensor, p: float, first_head: int) -> torch.Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


def synchronize_random_state(group: TensorParallelGroup, device: torch.device) -> None:
    """Set the default generators of all ranks of the group, the CPU's and the device's, to the first rank's state.

    Collective: broadcast over tp of the generator states, some kilobytes.
    """
    if group.size == 1:
        return
    torch.set_rng_state(broadcast_from_first_rank(group, torch.get_rng_state(), device))
    if device.type == "cuda":
        torch.cuda.set_rng_state(broadcast_from_first_rank(group, torch.cuda.get_rng_state(device), device), device)


def broadcast_from_first_rank(group: TensorParallelGroup, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Broadcast a CPU tensor from the first rank.

    Collective: broadcast over tp, on ``device`` because the backend may not serve the CPU.
    """
    if group.size == 1:
        return tensor
    assert group.process_group is not None
    value = tensor.to(device, copy=True)
    dist.broadcast(value, dist.get_global_rank(group.process_group, 0), group=group.process_group)
    return value.cpu()


@contextmanager
def private_stream(device: torch.device, first_head: int) -> Iterator[None]:
    """Context in which fused kernels draw dropout from a per-rank random state; the shared one is restored.

    The kernel takes its random numbers from the device's default generator, which is the same on all ranks of the
    group; seeded alike, all ranks would drop the same positions in different heads. Here the masks do depend on the
    degree: a kernel draws for all of its heads at once.
    """
    with _seeded(device, int(torch.randint(_MAX_SEED, ())) + first_head):
        yield


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def compiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    p: float,
    is_causal: bool,
    scaling: float,
    first_head: int,
) -> torch.Tensor:
    """Scaled dot-product attention in a private stream, as one operation of a compiled graph.

    A compiler cannot trace a change of the random state. The backward pass computes the attention once more, since
    kernels do not take the state that they have to repeat.

    [B, N_p, S, D] each, split by heads, and a mask that is broadcastable to [B, N_p, S_q, S_k], to [B, N_p, S_q, D].
    """
    seed = torch.randint(_MAX_SEED, ())
    output: torch.Tensor = _attention(query, key, value, mask, seed, p, is_causal, scaling, first_head)
    return output


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    p: float,
    is_causal: bool,
    scaling: float,
    first_head: int,
) -> torch.Tensor:
    with _seeded(query.device, int(seed) + first_head):
        output = F.scaled_dot_product_attention(query, key, value, mask, p, is_causal, scale=scaling)
    return output.contiguous()


# A graph of a GPU's driver would repeat the random numbers, so compilers must leave the operations out of it.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_attention = torch.library.custom_op("hf_megatron::attention", _attend, mutates_args=(), tags=_TAGS)


@torch.library.custom_op("hf_megatron::attention_backward", mutates_args=(), tags=_TAGS)
def _attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    p: float,
    is_causal: bool,
    scaling: float,
    first_head: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    # Within an operation autograd is off; nothing is excluded from the dispatch of the inner one.
    nothing = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), nothing), torch.enable_grad():
        output = _attend(inputs[0], inputs[1], inputs[2], mask, seed, p, is_causal, scaling, first_head)
    of_query, of_key, of_value = torch.autograd.grad(output, inputs, gradient)
    return of_query.contiguous(), of_key.contiguous(), of_value.contiguous()


@_attention.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


@_attention_backward.register_fake
def _(gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Any:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.p, ctx.is_causal, ctx.scaling, ctx.first_head = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    gradients = _attention_backward(gradient, *ctx.saved_tensors, ctx.p, ctx.is_causal, ctx.scaling, ctx.first_head)
    return (*gradients, *[None] * 6)


_attention.register_autograd(_backward, setup_context=_save)
