"""How the tensor-parallel models are compared with stock ones.

Checks that run on ranks call these functions there; they raise AssertionError with the numbers, because pytest does not
rewrite the asserts of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from tests.distributed import RankPool

if TYPE_CHECKING:
    from transformers.distributed import DistributedConfig

_T = TypeVar("_T")
Pool = Callable[[int], RankPool]
Tensors = dict[str, torch.Tensor]
Batch = Tensors

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def layout(tp_size: int, fsdp_size: int = 1, *, sequence_parallel: bool = False) -> DistributedConfig | None:
    """What to pass as ``distributed_config``; None in one plain process."""
    if tp_size * fsdp_size == 1:
        return None
    from transformers.distributed import DistributedConfig  # only here: tests of the layers do without transformers

    return DistributedConfig(tp_size=tp_size, fsdp_size=fsdp_size, enable_sequence_parallel=sequence_parallel)


def run_at(pool: Pool, size: int, job: Callable[..., _T], *args: Any, timeout: float = 60, **options: Any) -> list[_T]:
    """Run a job on live ranks, or here, without any process group, for one rank."""
    if size == 1:
        return [job(*args, **options)]
    return pool(size).run(job, *args, timeout=timeout, **options)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def reference_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The causal loss in the dtype of the logits; stock's own casts them to float32."""
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing, reduction="sum")
    return loss / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def loss_of(outputs: Any, valid: torch.Tensor) -> torch.Tensor:
    """The loss; of a base model, which has none, some function of all it gives."""
    if "loss" in outputs:
        loss: torch.Tensor = outputs.loss
        return loss
    pooled = outputs.get("pooler_output")
    found: torch.Tensor = outputs.last_hidden_state[valid].square().mean()
    return found if pooled is None else found + pooled.square().mean()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor or DTensor, detached. Collective for the latter."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_weights(model: nn.Module) -> Tensors:
    return {name: full(parameter).clone() for name, parameter in model.named_parameters()}


def gradients(model: nn.Module) -> Tensors:
    """Whole gradients of the parameters that have one, by module: weight and bias in one vector.

    Some biases have a gradient that is zero but for rounding: a key's bias moves all scores of a query alike, and one
    before a softmax over positions or choices all of those. Their weights show how large rounding may be.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.setdefault(name.rpartition(".")[0], []).append(full(parameter.grad).flatten())
    return {module: torch.cat(parts) for module, parts in found.items()}


def outputs_of(outputs: Any, valid: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor but loss and cache, at the positions [B, S] that are not padding."""
    for name, value in outputs.items():
        if name in ("loss", "cross_attentions", "cache", "past_key_values"):
            continue
        for i, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            by_position = tensor.movedim(2, 1) if name == "attentions" else tensor
            is_per_token = by_position.shape[:2] == valid.shape
            yield f"{name}[{i}]", by_position[valid] if is_per_token else by_position


def assert_outputs_agree(context: str, actual: Any, expected: Any, valid: torch.Tensor) -> None:
    tensors, reference = dict(outputs_of(actual, valid)), dict(outputs_of(expected, valid))
    assert list(tensors) == list(reference), f"{context}: {list(tensors)} instead of {list(reference)}"
    for name, value in reference.items():
        assert_agrees(f"{context}: {name}", tensors[name], value)


def assert_agrees(what: str, actual: torch.Tensor, expected: torch.Tensor, smallest_scale: float = 0.0) -> None:
    """Within 1e-5 (float32) or 1e-11 (float64) of the largest expected value, in the same dtype and shape."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{what}: {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    scale = max(expected.detach().abs().max().item(), smallest_scale)
    difference = (actual.detach() - expected.detach()).abs().max().item() / scale
    if not difference <= TOLERANCE[expected.dtype]:
        raise AssertionError(f"{what}: off by {difference:.1e} of the largest value {scale:.3g}")


def assert_all_agree(what: str, actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Each tensor relative to its own largest value, unless that is next to nothing beside the others'."""
    if actual.keys() != expected.keys():
        raise AssertionError(f"{what}: names differ in {sorted(actual.keys() ^ expected.keys())}")
    # Some gradients are zero but for rounding, such as that of a bias that moves all positions' scores alike.
    smallest_scale = 1e-3 * max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        assert_agrees(f"{what} of {name}", actual[name], value, smallest_scale)


def assert_all_equal(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit, and the same names."""
    if actual.keys() != expected.keys():
        raise AssertionError(f"names differ in {sorted(actual.keys() ^ expected.keys())}")
    wrong = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    if wrong:
        raise AssertionError(f"not bit-equal: {wrong}")


def assert_same_on_all_ranks(what: str, tensor: torch.Tensor) -> None:
    """Bit for bit. Collective, if there are ranks."""
    if not dist.is_initialized():
        return
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.detach().contiguous())
    different = [index for index, copy in enumerate(copies) if not torch.equal(copy, copies[0])]
    if different:
        raise AssertionError(f"{what} on ranks {different} is not that of rank 0")


def assert_replicas_equal(model: nn.Module) -> None:
    """Every parameter that all ranks hold whole is the same on all of them, bit for bit."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and all(isinstance(p, Replicate) for p in parameter.placements):
            assert_same_on_all_ranks(name, parameter.to_local())
