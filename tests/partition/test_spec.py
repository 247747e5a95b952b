"""One tensor: what its shards are, and that they make up the tensor again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_megatron.errors import PartitionError
from hf_megatron.partition import Box, FusedSplit, Replicated, Spec, Split, VocabSplit, tiling_error
from tests.partition.cuts import Shape, cuts, times_covered, unhurried


def _numbered(shape: Shape) -> torch.Tensor:
    """Every element different, so that no two orders of them look alike."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


def _chunks(tensor: torch.Tensor, num_chunks: int, dim: int) -> list[torch.Tensor]:
    """``torch.chunk``, with empty chunks where it returns too few."""
    chunks = list(tensor.chunk(num_chunks, dim))
    return chunks + [tensor.narrow(dim, 0, 0)] * (num_chunks - len(chunks))


def _reference(spec: Spec, tensor: torch.Tensor, tp_size: int) -> list[torch.Tensor]:
    """What each rank should hold, in torch's words."""
    match spec:
        case FusedSplit(dim=dim, num_blocks=num_blocks):
            cut_blocks = [_chunks(block, tp_size, dim) for block in tensor.chunk(num_blocks, dim)]
            return [torch.cat(parts, dim) for parts in zip(*cut_blocks, strict=True)]
        case Split(dim=dim):
            return _chunks(tensor, tp_size, dim)
    return [tensor] * tp_size


@unhurried
@given(cuts())
def test_shards_are_what_torch_chunk_gives(cut: tuple[Spec, Shape, int]) -> None:
    """Catches uneven sizes spread otherwise, gaps, mixed-up blocks, a wrong order of ranks, and a wrong merge."""
    spec, shape, tp_size = cut
    tensor = _numbered(shape)
    shards = spec.split(tensor, tp_size)
    for rank, (shard, reference) in enumerate(zip(shards, _reference(spec, tensor, tp_size), strict=True)):
        assert torch.equal(shard, reference)
        assert spec.shard_shape(shape, tp_size, rank) == tuple(reference.shape)
    assert torch.equal(spec.merge(shards), tensor)


@pytest.mark.parametrize("spec", [Replicated(), Split(0), Split(1), VocabSplit(), FusedSplit(0, 2), FusedSplit(1, 3)])
def test_every_bit_survives(spec: Spec) -> None:
    """Catches arithmetic on the way: every pattern of 16 bits, NaNs and subnormal numbers too, comes back."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(256, 256)[:, :255].contiguous()
    merged = spec.merge(spec.split(bits.view(torch.bfloat16), 4))
    assert torch.equal(merged.view(torch.int16), bits)


@unhurried
@given(cuts())
def test_boxes_hold_everything_once(cut: tuple[Spec, Shape, int]) -> None:
    """Catches elements that no rank or two ranks hold, or a directory, and empty boxes in it."""
    spec, shape, tp_size = cut
    boxes = [box for rank in range(tp_size) for box in spec.boxes(shape, tp_size, rank)]
    copies = tp_size if isinstance(spec, Replicated) else 1
    assert bool((times_covered(shape, boxes) == copies).all())
    stored = spec.stored_boxes(shape, tp_size)
    assert tiling_error(shape, stored) is None
    assert all(box.numel for box in stored)


def test_a_fused_tensor_is_stored_as_one_box_per_rank() -> None:
    """Catches the cut at run time, which is several boxes per rank, getting into the directory."""
    assert FusedSplit(1, 3).stored_boxes((2, 12), 2) == (Box((0, 0), (2, 6)), Box((0, 6), (2, 6)))
    assert FusedSplit(1, 3).boxes((2, 12), 2, 1) == (Box((0, 2), (2, 2)), Box((0, 6), (2, 2)), Box((0, 10), (2, 2)))


@pytest.mark.parametrize("spec", [Replicated(), Split(0), Split(1), VocabSplit()])
def test_a_shard_of_one_box_is_a_view(spec: Spec) -> None:
    """Catches copies, which would double the memory of whoever splits a large tensor."""
    tensor = _numbered((7, 6))
    for shard in spec.split(tensor, 3):
        assert shard.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@unhurried
@given(st.data())
def test_intersection_is_what_both_cover(data: st.DataObject) -> None:
    """Catches an intersection that is too large, too small, or an empty box where there is none."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))

    def box() -> Box:
        ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
        return Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))

    first, second = box(), box()
    both = times_covered(shape, [first]) * times_covered(shape, [second])
    common = first.intersection(second)
    assert torch.equal(both, times_covered(shape, [] if common is None else [common]))
    assert common is None or common.numel > 0
    assert common == second.intersection(first)


@pytest.mark.parametrize("spec", [Split(0), VocabSplit()])
def test_a_rank_without_rows_is_refused(spec: Spec) -> None:
    """Catches an empty shard, on which a maximum over the vocabulary fails far from the cause."""
    message = r"wte\.weight has 5 entries along dim 0; .*tp_size=4 .* would hold none\. Choose fewer\."
    with pytest.raises(PartitionError, match=message):
        spec.check("wte.weight", (5, 2), 4)
    for tp_size in (1, 2, 3, 5):
        spec.check("wte.weight", (5, 2), tp_size)


@pytest.mark.parametrize(
    ("shape", "tp_size", "message"),
    [
        ((4, 10), 2, "c_attn has 10 entries along dim 1, which is not 3 blocks of equal size"),
        ((4, 15), 4, "c_attn has 5 entries along dim 1; cut over tp_size=4"),
    ],
)
def test_unequal_blocks_are_refused(shape: Shape, tp_size: int, message: str) -> None:
    """Catches a fused tensor whose last entries would belong to no block, and small whole tensors refused."""
    with pytest.raises(PartitionError, match=message):
        FusedSplit(1, 3).check("c_attn", shape, tp_size)
    FusedSplit(1, 3).check("c_attn", (4, 15), 3)
    Replicated().check("bias", (1,), 8)
