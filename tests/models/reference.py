"""What the tensor-parallel models are compared with: stock models, tiny, with weights that make every mistake visible.

Checks that run on ranks call these functions there; they raise AssertionError with the numbers, because pytest does not
rewrite the asserts of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronGPT2LMHeadModel
from tests.distributed import RankPool

_T = TypeVar("_T")
Pool = Callable[[int], RankPool]
Batch = dict[str, torch.Tensor]

# 12 heads can be cut over 2, 3 and 4 ranks; the vocabulary, a prime, over none of them evenly.
TINY: dict[str, Any] = {
    "vocab_size": 131,
    "n_positions": 32,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 12,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 130,
    "pad_token_id": 0,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "n_inner": {"n_inner": 100},
    "uneven_n_inner": {"n_inner": 101},
    "inverse_layer_scaling": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "unscaled": {"scale_attn_weights": False},
    "untied": {"tie_word_embeddings": False},
    "gpt2_vocabulary": {"vocab_size": 50257, "n_layer": 1},
}

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def tiny_config(**changes: Any) -> GPT2Config:
    return GPT2Config(**{**TINY, **changes})


def save_stock(directory: Path, model_class: type[PreTrainedModel] = GPT2LMHeadModel, **changes: Any) -> Path:
    """Save a stock model whose biases and norms are not the zeros and ones of a fresh one."""
    model = model_class(tiny_config(**changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if ".ln_" in name and name.endswith("weight"):
                parameter.add_(1.0)
    model.save_pretrained(directory)
    return directory


def token_ids(batch_size: int = 3, length: int = 9, vocab_size: int = 131, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def make_batch(padding: str = "none", vocab_size: int = 131) -> Batch:
    """Ids [3, 9] and labels; with ``"left"`` or ``"right"`` padding also a mask, and labels of -100."""
    ids = token_ids(vocab_size=vocab_size)
    if padding == "none":
        return {"input_ids": ids, "labels": ids.clone()}
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 2, 5)):
        mask[row, :count] = 0
    if padding == "right":
        mask = mask.flip(1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


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


def layout(tp_size: int, fsdp_size: int = 1, *, sequence_parallel: bool = False) -> DistributedConfig | None:
    """What to pass as ``distributed_config``; None in one plain process."""
    if tp_size * fsdp_size == 1:
        return None
    return DistributedConfig(tp_size=tp_size, fsdp_size=fsdp_size, enable_sequence_parallel=sequence_parallel)


def run_at(
    pool: Pool, num_ranks: int, job: Callable[..., _T], *args: Any, timeout: float = 60.0, **kwargs: Any
) -> list[_T]:
    """Run a job on live ranks, or here, without any process group, for one rank."""
    if num_ranks == 1:
        return [job(*args, **kwargs)]
    return pool(num_ranks).run(job, *args, timeout=timeout, **kwargs)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor or DTensor, detached. Collective for the latter."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return full(parameter.grad)


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(parameter).clone() for name, parameter in model.named_parameters()}


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: gradient(parameter) for name, parameter in model.named_parameters()}


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


def save_distributed(stock: Path, directory: Path, tp_size: int, fsdp_size: int = 1) -> None:
    """A job: load a stock directory on this layout and save it as a tp directory."""
    model = MegatronGPT2LMHeadModel.from_pretrained(stock, distributed_config=layout(tp_size, fsdp_size))
    model.save_pretrained(directory, distributed_checkpoint=True)
