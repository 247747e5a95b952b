"""How exact the gradients of the fused loss are in 16 bits, next to stock's way, from unsure to certain models.

    python -m benchmarks.bench_loss_gradient

For 1,024 tokens of a head under autocast, whose targets have a mean loss from 10 down to 1e-5: the error of each
gradient against the same computation in float64, relative to its norm, and that error over stock's. Stock's way is what
transformers does: logits by an autocast product, cast to float32, torch's cross entropy. float16 has a loss scale of
2**16 in both, and a second table has what becomes of 8,192 tokens with one predictable target at every loss scale.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from benchmarks import records
from benchmarks.command_line import make_parser, parse
from hf_megatron.partition import VocabSplit
from hf_megatron.tensor_parallel import SINGLE, TensorParallelGroup, vocab_parallel_linear_cross_entropy

TOKENS, HIDDEN, VOCABULARY = 1024, 128, 2048
LOSSES = (10.0, 4.0, 1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
DTYPES = (torch.bfloat16, torch.float16)
LOSS_SCALES = {torch.bfloat16: 1.0, torch.float16: 2.0**16}
TENSORS = ("hidden states", "weight", "bias")
Tensors = tuple[torch.Tensor, ...]


@cache
def make_head(loss: float, tokens: int = TOKENS, *, one_target: bool = False) -> tuple[Tensors, torch.Tensor]:
    """Hidden states, weight and bias in float32 whose targets have about this mean loss, and the targets."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5
    bias = torch.randn(VOCABULARY, generator=generator) * 0.1
    target = torch.randint(VOCABULARY, (tokens,), generator=generator)
    if one_target:
        target = torch.full_like(target, 17)
    noise = torch.randn(tokens, HIDDEN, generator=generator)

    def hidden(strength: float) -> Any:
        return noise + strength * weight[target] / weight[target].norm(dim=1, keepdim=True) ** 2

    low, high = -40.0, 60.0
    some = slice(64)
    for _ in range(24):  # the loss falls as hidden states point to their targets
        middle = (low + high) / 2
        logits = F.linear(hidden(middle)[some].double(), weight.double(), bias.double())
        is_above = F.cross_entropy(logits, target[some]) > loss
        low, high = (middle, high) if is_above else (low, middle)
    return (hidden(high), weight, bias), target


def gradients_of_stock(tensors: Tensors, target: torch.Tensor, dtype: torch.dtype, smoothing: float) -> Tensors:
    """By torch's own functions, in float64 or under autocast."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [tensor.to(wide, copy=True).requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float64):
        logits = F.linear(*leaves)
    loss = F.cross_entropy(logits.to(wide), target, label_smoothing=smoothing)
    scale = LOSS_SCALES.get(dtype, 1.0)
    (loss * scale).backward()
    return tuple(leaf.grad.double() / scale for leaf in leaves if leaf.grad is not None)


def gradients_of_ours(
    group: TensorParallelGroup,
    tensors: Tensors,
    target: torch.Tensor,
    dtype: torch.dtype,
    smoothing: float,
    scale: float | None = None,
) -> Tensors:
    """This rank's, by the fused loss under autocast."""
    hidden = tensors[0].clone().requires_grad_()
    weight, bias = (
        VocabSplit(0).shard(tensor, group.size, group.rank).clone().requires_grad_() for tensor in tensors[1:]
    )
    with torch.autocast("cpu", dtype):
        loss = vocab_parallel_linear_cross_entropy(
            group, hidden, weight, bias, target, vocab_size=VOCABULARY, label_smoothing=smoothing
        )
    scale = LOSS_SCALES[dtype] if scale is None else scale
    (loss * scale).backward()
    return tuple(leaf.grad.double() / scale for leaf in (hidden, weight, bias) if leaf.grad is not None)


def compare(loss: float, dtype: torch.dtype, smoothing: float, ours: list[Tensors]) -> list[dict[str, Any]]:
    """The errors of each gradient, ours from all ranks' parts."""
    tensors, target = make_head(loss)
    exact = gradients_of_stock(tensors, target, torch.float64, smoothing)
    stock = gradients_of_stock(tensors, target, dtype, smoothing)
    merged = (ours[0][0], *(VocabSplit(0).merge([part[i] for part in ours]) for i in (1, 2)))
    rows = []
    for name, mine, theirs, truth in zip(TENSORS, merged, stock, exact, strict=True):
        errors = [float((found - truth).norm() / truth.norm()) for found in (mine, theirs)]
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "tp": len(ours),
                "label smoothing": smoothing,
                "loss": loss,
                "gradient": name,
                "ours": errors[0],
                "stock": errors[1],
                "ratio": errors[0] / errors[1],
            }
        )
    return rows


def _grid(losses: Sequence[float]) -> list[tuple[float, torch.dtype, float]]:
    return [(loss, dtype, smoothing) for dtype in DTYPES for smoothing in (0.0, 0.1) for loss in losses]


def _rank(rank: int, tp_size: int, losses: Sequence[float], scratch: str) -> None:
    """One rank's gradients of all cases, into a file."""
    torch.set_num_threads(1)
    group = SINGLE
    if tp_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=tp_size)
        group = TensorParallelGroup.from_mesh(dist.device_mesh.init_device_mesh("cpu", (tp_size,)))
    found = [gradients_of_ours(group, *make_head(loss), dtype, smoothing) for loss, dtype, smoothing in _grid(losses)]
    torch.save(found, Path(scratch) / f"{rank}.pt")
    if tp_size > 1:
        dist.destroy_process_group()


def measure(tp_size: int, losses: Sequence[float]) -> list[dict[str, Any]]:
    """All cases at one degree."""
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(_rank, (tp_size, losses, scratch), nprocs=tp_size)
        ranks = [torch.load(Path(scratch) / f"{rank}.pt") for rank in range(tp_size)]
    return [row for i, case in enumerate(_grid(losses)) for row in compare(*case, [rank[i] for rank in ranks])]


def finite_at_every_loss_scale() -> dict[str, bool]:
    """Whether float16's gradients are finite, for 8,192 tokens of one target that the model is sure of."""
    tensors, target = make_head(1e-4, 8192, one_target=True)
    scales = [2.0**exponent for exponent in range(16, -11, -2)]
    finite = {}
    for scale in scales:
        gradients = gradients_of_ours(SINGLE, tensors, target, torch.float16, 0.0, scale)
        finite[f"2**{int(torch.tensor(scale).log2())}"] = all(bool(g.isfinite().all()) for g in gradients)
    return finite


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write ``loss_gradient.json``."""
    given, file = parse(make_parser(__doc__, "quick"), arguments, "loss_gradient")
    losses = LOSSES[2::3] if given.quick else LOSSES
    rows = [row for tp_size in (1, 2) for row in measure(tp_size, losses)]
    finite = finite_at_every_loss_scale()
    print(f"{'dtype':9} tp  smooth  loss   gradient        ours      stock     ratio")
    for row in rows:
        print(
            f"{row['dtype']:9} {row['tp']}   {row['label smoothing']:<5}  {row['loss']:<6g} {row['gradient']:14} "
            f"{row['ours']:.2e}  {row['stock']:.2e}  {row['ratio']:.2f}"
        )
    print(f"finite at loss scales of 2**16 to 2**-10, 8,192 tokens of one target: {all(finite.values())}")
    records.write(
        file,
        {"rows": rows, "finite at loss scale": finite, "environment": records.environment("torch", "hf-megatron")},
    )


if __name__ == "__main__":
    main()
