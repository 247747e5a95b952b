"""Head and loss in one against torch's on the whole logits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_megatron.errors import PartitionError
from hf_megatron.partition import VocabSplit
from hf_megatron.tensor_parallel import SINGLE, cpu, vocab_parallel_linear_cross_entropy
from tests.tensor_parallel.ranks import TP_SIZES, Pool, assert_close, group, same_on_all_ranks

Tensors = tuple[Any, ...]  # None for a bias there is none of, or a gradient

H, V = 16, 131  # V over 2 ranks: 66 and 65; over 4: 33, 33, 33 and 32
# On every rank of 4, the first and the last token among them, one of them twice; ignored positions in between.
TARGET = torch.tensor([0, 130, -100, 33, 65, -100, 66, 32, 98, 99, 98, -100])
CUT = VocabSplit(0)


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and bias whose logits differ by as much as a trained model's."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((len(TARGET), H), (V, H), (V,))
    hidden, weight, bias = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


def _run(
    tensors: Tensors,
    target: Any = TARGET,
    *,
    scale: float = 1.7,
    autocast: Any = None,
    frozen: Any = (),
    **options: Any,
) -> Tensors:
    """The loss, and the gradients of hidden states, weight and bias, of which a rank has its part."""
    tp = group()
    parts = [t if t is None or i == 0 else CUT.shard(t, tp.size, tp.rank) for i, t in enumerate(tensors)]
    leaves: list[Any] = [
        None if part is None else part.clone().requires_grad_(i not in frozen) for i, part in enumerate(parts)
    ]
    hidden, weight, bias = leaves
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = vocab_parallel_linear_cross_entropy(tp, hidden, weight, bias, target, vocab_size=V, **options)
    if loss.requires_grad:
        (loss * scale).backward()
    return (loss.detach(), *(None if leaf is None else leaf.grad for leaf in leaves))


def _reference(
    tensors: Tensors,
    target: Any = TARGET,
    *,
    scale: float = 1.7,
    autocast: Any = None,
    frozen: Any = (),
    **options: Any,
) -> Tensors:
    """The same by torch, with bfloat16 tensors in float32."""
    wide = [t if t is None or t.dtype == torch.float64 else t.float() for t in tensors]
    leaves: list[Any] = [None if t is None else t.clone().requires_grad_(i not in frozen) for i, t in enumerate(wide)]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = F.linear(*leaves)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    divisor = options.pop("num_items_in_batch", None) or int((target != -100).sum())
    loss = F.cross_entropy(logits, target, reduction="sum", **options) / divisor
    if loss.requires_grad:
        (loss * scale).backward()
    gradients = [None if leaf is None else leaf.grad for leaf in leaves]
    return loss.detach(), *(None if g is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True))


def _whole(results: list[Tensors]) -> Tensors:
    """What the ranks have, put together."""
    losses, d_hiddens, *parameters = (
        [part for part in parts if part is not None] for parts in zip(*results, strict=True)
    )
    return same_on_all_ranks(losses), same_on_all_ranks(d_hiddens), *(CUT.merge(p) if p else None for p in parameters)


def _assert_all_close(actual: Tensors, expected: Tensors, tolerance: float = 1e-12) -> None:
    for ours, torchs in zip(actual, expected, strict=True):
        assert (ours is None) == (torchs is None)
        if ours is not None:
            assert_close(ours, torchs, tolerance)


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
    results = pool(tp_size).run(_run, tensors, **options, chunk_size=chunk_size)
    _assert_all_close(_whole(results), _reference(tensors, **options))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-6)], ids=str)
@pytest.mark.parametrize("chunk_size", [4, None])
def test_short_dtypes(pool: Pool, dtype: torch.dtype, tolerance: float, chunk_size: int | None) -> None:
    """Catches a loss computed in bfloat16, and gradients in another dtype than their tensor."""
    # In bfloat16 logits are rounded to 8 bits, in torch's product as in ours.
    results = pool(2).run(_run, _inputs(dtype), chunk_size=chunk_size)
    _assert_all_close(_whole(results), _reference(_inputs(dtype)), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, label_smoothing: float) -> None:
    """Catches rows left out between blocks, and statistics that end up at other tokens."""
    results = []
    for rows in (9, 5):  # of the 9 that count
        monkeypatch.setattr(cpu, "_LOGITS_PER_BLOCK", rows * V)
        results.append(_run(_inputs(dtype), label_smoothing=label_smoothing))
    _assert_all_close(results[1], results[0], 0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-8)], ids=str)
def test_autocast(dtype: torch.dtype, tolerance: float) -> None:
    """Catches products that ignore autocast, a loss in its dtype, and small gradients lost in float16."""
    hidden, weight, _ = _inputs(torch.float32)
    actual = _run((hidden, weight, None), autocast=dtype, scale=2.0**16)
    expected = _reference((hidden, weight, None), scale=2.0**16)
    _assert_all_close(actual, expected, tolerance)
    assert actual[0] != expected[0]


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_what_needs_no_gradient_gets_none(frozen: tuple[int, ...]) -> None:
    """Catches gradients computed where nobody wants them, and wrong ones beside those that are not."""
    hidden, weight, _ = _inputs()
    tensors = (hidden, weight, None)
    _assert_all_close(_run(tensors, frozen=frozen), _reference(tensors, frozen=frozen))


def test_no_token_counts() -> None:
    """Catches a division by zero that reaches the gradients."""
    loss, *gradients = _run(_inputs(), torch.full_like(TARGET, -100))
    assert loss.isnan()
    assert not any(gradient is None or gradient.any() for gradient in gradients)


def test_targets_outside_of_the_vocabulary() -> None:
    """Catches a target of no rank, whose loss would be that of the normalizer alone."""
    with pytest.raises(PartitionError, match=r"target 131 .* vocab_size=131"):
        _run(_inputs(), TARGET + 1)


def _partial() -> tuple[torch.Tensor, torch.Tensor]:
    whole, partial = (_run(_inputs(), reduce_gradient=reduce_gradient)[1] for reduce_gradient in (True, False))
    dist.all_reduce(partial)
    return whole, partial


def test_gradient_left_a_partial_sum(pool: Pool) -> None:
    """Catches a gradient that a reduce-scatter would count twice."""
    for whole, partial in pool(2).run(_partial):
        _assert_all_close((partial,), (whole,))


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes, a weight's gradient aside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[1:] != (H,):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("vocab_size", [50_000, 200_000])
def test_memory_grows_with_neither_vocabulary_nor_tokens(vocab_size: int) -> None:
    """Catches logits, or their gradient, that exist whole."""
    hidden, weight = (torch.randn(size, H, requires_grad=True) for size in (1000, vocab_size))
    with _Largest() as largest:
        vocab_parallel_linear_cross_entropy(
            SINGLE, hidden, weight, None, torch.arange(1000), vocab_size=vocab_size
        ).backward()
    assert largest.elements <= 2**24


def _sure(loss: float, tokens: int, *, one_target: bool = False) -> tuple[Tensors, torch.Tensor]:
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_gradients_of_a_sure_model_are_as_exact_as_stocks(
    pool: Pool, tp_size: int, smoothing: float, loss: float, dtype: torch.dtype
) -> None:
    """Catches a probability rounded before its target is taken from it: what is left of the gradient is rounding."""
    tensors, target = _sure(loss, 256)
    options: dict[str, Any] = {"scale": 2.0**16 if dtype == torch.float16 else 1.0, "label_smoothing": smoothing}
    ours = _whole(pool(tp_size).run(_run, tensors, target, autocast=dtype, **options))
    stock = _reference(tensors, target, autocast=dtype, **options)
    exact = _reference(tuple(None if t is None else t.double() for t in tensors), target, **options)
    for mine, theirs, truth in zip(ours[1:], stock[1:], exact[1:], strict=True):
        assert (mine - truth).norm() <= 1.1 * (theirs - truth).norm()


@pytest.mark.parametrize("exponent", [16, 3, -10])
def test_many_tokens_of_one_target_do_not_overflow_in_float16(exponent: int) -> None:
    """Catches sums over tokens that reach the end of float16's range before the loss scale is known."""
    tensors, target = _sure(1e-4, 8192, one_target=True)
    results = _run(tensors, target, autocast=torch.float16, scale=2.0**exponent)
    assert all(tensor.isfinite().all() for tensor in results)


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
