"""Head and loss in one against torch's on the whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hf_megatron.errors import PartitionError
from hf_megatron.partition import VocabSplit
from hf_megatron.tensor_parallel import SINGLE, cpu, vocab_parallel_linear_cross_entropy
from tests.tensor_parallel.ranks import TP_SIZES, Pool, assert_close, group, same_on_all_ranks

H, V = 16, 131  # V over 2 ranks: 66 and 65; over 4: 33, 33, 33 and 32
# On every rank of 4, the first and the last token among them, one of them twice; ignored positions in between.
TARGET = torch.tensor([0, 130, -100, 33, 65, -100, 66, 32, 98, 99, 98, -100])
CUT = VocabSplit(0)
# In bfloat16 logits are rounded to 8 bits, in torch's product as in ours.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-6}


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and bias whose logits differ by as much as a trained model's."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((len(TARGET), H), (V, H), (V,))
    hidden, weight, bias = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


def _run(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    tp = group()
    hidden = hidden.clone().requires_grad_()
    weight = CUT.shard(weight, tp.size, tp.rank).clone().requires_grad_()
    bias = None if bias is None else CUT.shard(bias, tp.size, tp.rank).clone().requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(tp, hidden, weight, bias, target, vocab_size=V, **options)
    (loss * options.get("num_items_in_batch", 1.7)).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    grads = (hidden.grad, weight.grad)
    return (loss.detach(), *grads) if bias is None or bias.grad is None else (loss.detach(), *grads, bias.grad)


def _reference(
    tensors: tuple[torch.Tensor | None, ...], target: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Loss and gradients by torch, in float64 for float64 and in float32 otherwise."""
    dtype = tensors[0].dtype if tensors[0] is not None else torch.float64
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [None if t is None else t.to(wide).clone().requires_grad_() for t in tensors]
    hidden, weight, bias = leaves
    assert hidden is not None
    assert weight is not None
    logits = F.linear(hidden, weight, bias)
    divisor = options.get("num_items_in_batch", int((target != -100).sum()))
    smoothing = options.get("label_smoothing", 0.0)
    loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing) / divisor
    (loss * options.get("num_items_in_batch", 1.7)).backward()
    gradients = [leaf.grad.to(dtype) for leaf in leaves if leaf is not None and leaf.grad is not None]
    return (loss.detach(), *gradients)


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 5.0}, {"label_smoothing": 0.1}], ids=str)
def test_loss_and_gradients_equal_torchs(
    pool: Pool, tp_size: int, chunk_size: int | None, has_bias: bool, options: dict[str, Any]
) -> None:
    """Catches a chunk counted twice or left out, a rank's maximum for everybody's, and a target's row left in."""
    hidden, weight, bias = _inputs()
    tensors = (hidden, weight, bias if has_bias else None)
    results = pool(tp_size).run(_run, *tensors, TARGET, {**options, "chunk_size": chunk_size})
    losses, d_hiddens, *parameters = zip(*results, strict=True)
    actual = (same_on_all_ranks(losses), same_on_all_ranks(d_hiddens), *(CUT.merge(list(p)) for p in parameters))
    for ours, torchs in zip(actual, _reference(tensors, TARGET, options), strict=True):
        assert_close(ours, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [4, None])
def test_short_dtypes(pool: Pool, dtype: torch.dtype, chunk_size: int | None) -> None:
    """Catches a loss computed in bfloat16, and gradients in another dtype than their tensor."""
    tensors = _inputs(dtype)
    results = pool(2).run(_run, *tensors, TARGET, {"chunk_size": chunk_size})
    loss, d_hidden, d_weight, d_bias = zip(*results, strict=True)
    actual = (loss[0], d_hidden[0], CUT.merge(list(d_weight)), CUT.merge(list(d_bias)))
    for ours, torchs in zip(actual, _reference(tensors, TARGET, {}), strict=True):
        assert_close(ours, torchs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, label_smoothing: float) -> None:
    """Catches rows left out between blocks, and statistics that end up at other tokens."""
    results = []
    for rows in (9, 5):  # of the 9 that count
        monkeypatch.setattr(cpu, "_LOGITS_PER_BLOCK", rows * V)
        hidden, weight, bias = (tensor.requires_grad_() for tensor in _inputs(dtype))
        loss = vocab_parallel_linear_cross_entropy(
            SINGLE, hidden, weight, bias, TARGET, vocab_size=V, label_smoothing=label_smoothing
        )
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in (hidden, weight, bias) if leaf.grad is not None)))
    for whole, in_blocks in zip(*results, strict=True):
        assert torch.equal(whole, in_blocks)


def _autocast(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = vocab_parallel_linear_cross_entropy(SINGLE, hidden, weight, None, TARGET, vocab_size=V)
        (loss * 2.0**16).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad / 2.0**16, weight.grad / 2.0**16


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-8)], ids=str)
def test_autocast(dtype: torch.dtype, tolerance: float) -> None:
    """Catches products that ignore autocast, a loss in its dtype, and small gradients lost in float16 in spite of a
    loss scale."""
    hidden, weight, _ = _inputs(torch.float32)
    loss, d_hidden, d_weight = _autocast(hidden, weight, dtype)
    assert (loss.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32,) * 3
    expected = _reference((hidden, weight, None), TARGET, {"num_items_in_batch": 9.0})
    assert_close(loss, expected[0], tolerance)
    assert loss != expected[0]
    assert_close(d_hidden, expected[1] / 9.0, tolerance)
    assert_close(d_weight, expected[2] / 9.0, tolerance)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "all"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    """Catches gradients computed where nobody wants them, and wrong ones beside those that are not."""
    hidden, weight, _ = _inputs()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = vocab_parallel_linear_cross_entropy(SINGLE, hidden, weight, None, TARGET, vocab_size=V)
    assert loss.requires_grad == (frozen != "all")
    expected = _reference((hidden.detach(), weight.detach(), None), TARGET, {"num_items_in_batch": 9.0})
    assert_close(loss.detach(), expected[0])
    if frozen != "all":
        loss.backward()
        leaf, gradient = (hidden, expected[1]) if frozen == "weight" else (weight, expected[2])
        assert leaf.grad is not None
        assert_close(leaf.grad, gradient / 9.0)


def test_no_token_counts() -> None:
    """Catches a division by zero that reaches the gradients."""
    hidden, weight, bias = (tensor.requires_grad_() for tensor in _inputs())
    target = torch.full_like(TARGET, -100)
    loss = vocab_parallel_linear_cross_entropy(SINGLE, hidden, weight, bias, target, vocab_size=V)
    assert loss.isnan()
    loss.backward()
    for tensor in (hidden, weight, bias):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_targets_outside_of_the_vocabulary() -> None:
    """Catches a target of no rank, whose loss would be that of the normalizer alone."""
    hidden, weight, bias = _inputs()
    with pytest.raises(PartitionError, match=r"target 131 .* vocab_size=131"):
        vocab_parallel_linear_cross_entropy(SINGLE, hidden, weight, bias, TARGET + 1, vocab_size=V)


def _partial(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tp = group()
    gradients = []
    for reduce_gradient in (True, False):
        leaf = hidden.clone().requires_grad_()
        shard = CUT.shard(weight, tp.size, tp.rank)
        vocab_parallel_linear_cross_entropy(
            tp, leaf, shard, None, TARGET, vocab_size=V, reduce_gradient=reduce_gradient
        ).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    whole, partial = gradients
    dist.all_reduce(partial)
    return whole, partial


def test_gradient_left_a_partial_sum(pool: Pool) -> None:
    """Catches a gradient that a reduce-scatter would count twice."""
    for whole, partial in pool(2).run(_partial, *_inputs()[:2]):
        assert_close(partial, whole)


def _largest_tensor(vocab_size: int, num_tokens: int) -> int:
    """Elements of the largest tensor that any operation of a step makes, parameters' gradients aside."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape != (vocab_size, H):
                sizes.append(out.numel())
            return out

    hidden = torch.randn(num_tokens, H, requires_grad=True)
    weight = torch.randn(vocab_size, H, requires_grad=True)
    target = torch.arange(num_tokens)
    with Watch():
        vocab_parallel_linear_cross_entropy(SINGLE, hidden, weight, None, target, vocab_size=vocab_size).backward()
    return max(sizes)


def test_memory_grows_with_neither_vocabulary_nor_tokens() -> None:
    """Catches logits, or their gradient, that exist whole."""
    assert _largest_tensor(50_000, 1000) <= 2**24
    assert _largest_tensor(200_000, 1000) <= 2**24


def _sure(loss: float, tokens: int, *, one_target: bool = False) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Hidden states, weight and bias whose targets have about this mean loss, and the targets."""
    generator = torch.Generator().manual_seed(1)
    weight = F.normalize(torch.randn(V, H, generator=generator))  # of one length, so that a token's own row is nearest
    target = torch.randint(V, (tokens,), generator=generator)
    if one_target:
        target = torch.full_like(target, 17)
    noise, bias = torch.randn(tokens, H, generator=generator) / 4, torch.zeros(V)
    for strength in range(200):
        hidden = noise + strength * weight[target]
        if F.cross_entropy(F.linear(hidden.double(), weight.double()), target) < loss:
            return (hidden, weight, bias), target
    raise AssertionError(f"the targets do not become as likely as a loss of {loss}")


def _gradients_in_short(
    tensors: tuple[torch.Tensor, ...],
    target: torch.Tensor,
    dtype: torch.dtype,
    scale: float = 1.0,
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    tp = group()
    hidden, *parameters = tensors
    leaves = [hidden.clone(), *(CUT.shard(p, tp.size, tp.rank).clone() for p in parameters)]
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    with torch.autocast("cpu", dtype):
        loss = vocab_parallel_linear_cross_entropy(
            tp, hidden, weight, bias, target, vocab_size=V, label_smoothing=smoothing
        )
    (loss * scale).backward()
    return tuple(leaf.grad / scale for leaf in (hidden, weight, bias) if leaf.grad is not None)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_gradients_of_a_sure_model_are_as_exact_as_stocks(
    pool: Pool, tp_size: int, smoothing: float, loss: float, dtype: torch.dtype
) -> None:
    """Catches a probability rounded before its target is taken from it: what is left of the gradient is rounding."""
    tensors, target = _sure(loss, 256)
    scale = 2.0**16 if dtype == torch.float16 else 1.0
    results = pool(tp_size).run(_gradients_in_short, tensors, target, dtype, scale, smoothing)
    hidden, weight, bias = zip(*results, strict=True)
    ours = (hidden[0], CUT.merge(list(weight)), CUT.merge(list(bias)))

    exact = [tensor.double().requires_grad_() for tensor in tensors]
    F.cross_entropy(F.linear(*exact), target, label_smoothing=smoothing).backward()
    stock = [tensor.clone().requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", dtype):
        logits = F.linear(*stock)
    (F.cross_entropy(logits.float(), target, label_smoothing=smoothing) * scale).backward()
    for mine, theirs, truth in zip(ours, stock, exact, strict=True):
        assert theirs.grad is not None
        assert truth.grad is not None
        assert _error(mine, truth.grad) <= 1.1 * _error(theirs.grad / scale, truth.grad)


@pytest.mark.parametrize("exponent", [16, 3, -10])
def test_many_tokens_of_one_target_do_not_overflow_in_float16(pool: Pool, exponent: int) -> None:
    """Catches sums over tokens that reach the end of float16's range before the loss scale is known."""
    tensors, target = _sure(1e-4, 8192, one_target=True)
    (gradients,) = pool(1).run(_gradients_in_short, tensors, target, torch.float16, 2.0**exponent)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_many_chunks_are_not_added_up_in_bfloat16() -> None:
    """Catches a sum in bfloat16, which stops growing where a chunk is less than half of its last bit."""
    count = 1024
    hidden = torch.ones(count, H, dtype=torch.bfloat16)
    weight = torch.zeros(V, H, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(count, dtype=torch.long)
    vocab_parallel_linear_cross_entropy(SINGLE, hidden, weight, None, target, vocab_size=V, chunk_size=1).backward()
    assert weight.grad is not None
    # Each chunk's part and the sum are rounded once, to 8 bits.
    torch.testing.assert_close(weight.grad[0].float(), torch.full((H,), 1 / V - 1), rtol=2**-7, atol=0.0)
