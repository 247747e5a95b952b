"""Loading: each rank reads its own slices of the files and holds its own part of the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hf_megatron import MegatronGPT2ForTokenClassification, MegatronGPT2LMHeadModel
from hf_megatron.architectures import GPT2
from hf_megatron.checkpoint import LazyTensor
from hf_megatron.partition import Box, Replicated
from tests.models.reference import Pool, assert_all_equal, full_weights, layout, rank, run_at, save_distributed
from tests.tiers import quick

StockDir = Callable[[str], Path]
Reads = dict[str, list[Box]]


@contextmanager
def _recorded_reads() -> Iterator[Reads]:
    """The boxes read from files, by stored name, in order."""
    reads: Reads = {}
    read = LazyTensor.read

    def recording(self: LazyTensor, box: Box | None = None) -> torch.Tensor:
        reads.setdefault(self.name, []).append(Box.whole(self.shape) if box is None else box)
        return read(self, box)

    with mock.patch.object(LazyTensor, "read", recording):
        yield reads


def _check_reads(directory: Path, tp_size: int, options: dict[str, Any]) -> None:
    with _recorded_reads() as reads:
        model = MegatronGPT2LMHeadModel.from_pretrained(directory, distributed_config=layout(tp_size), **options)
    config = model.config.to_dict()
    tensors = GPT2.tensors(config, GPT2.model_class("GPT2LMHeadModel"))
    assert reads.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = list(tensor.spec.boxes(tensor.shape, tp_size, rank()))
        assert reads[name] == expected, f"{name}: read {reads[name]}, expected {expected}"

    sharded = [t for t in tensors.values() if not isinstance(t.spec, Replicated)]
    held = {name: p.to_local().numel() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    for tensor in sharded:
        assert held[tensor.name] == sum(box.numel for box in tensor.spec.boxes(tensor.shape, tp_size, rank()))
    share = sum(held[t.name] for t in sharded) / sum(Box.whole(t.shape).numel for t in sharded)
    assert abs(share - 1 / tp_size) < 0.02, f"holds {share:.3f} of the sharded parameters"
    assert all(p.to_local().untyped_storage().nbytes() == p.to_local().nbytes for p in model.parameters())


@pytest.mark.parametrize(
    ("variant", "tp_size"),
    quick(itertools.product(("base", "untied", "uneven_n_inner"), (2, 4)), [("base", 2), ("uneven_n_inner", 4)]),
)
def test_a_rank_reads_and_holds_its_slices_only(pool: Pool, stock_dir: StockDir, variant: str, tp_size: int) -> None:
    """Catches a rank that reads a tensor whole to keep a part, holds a view of it, or reads anything twice."""
    run_at(pool, tp_size, _check_reads, stock_dir(variant), tp_size, {"dtype": torch.float64})


def _check_reads_under_fsdp(directory: Path) -> None:
    with _recorded_reads() as reads:
        model = MegatronGPT2LMHeadModel.from_pretrained(directory, distributed_config=layout(2, 2))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        shape, _ = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        assert sum(box.numel for box in reads[name]) == torch.Size(shape).numel(), f"{name}: read {reads[name]}"


def test_under_fsdp_a_rank_reads_its_block_only(pool: Pool, stock_dir: StockDir) -> None:
    """Catches reading along one dimension of the mesh only: every rank of a TP x FSDP mesh has a block of its own."""
    run_at(pool, 4, _check_reads_under_fsdp, stock_dir("base"))


def _check_reads_of_another_degree(stock: Path, directory: Path) -> None:
    """From a tp directory that two ranks saved, at this world's degree."""
    tp_size = dist.get_world_size()
    _check_reads(directory, tp_size, {})
    ours = MegatronGPT2LMHeadModel.from_pretrained(directory, distributed_config=layout(tp_size))
    assert_all_equal(full_weights(ours), full_weights(MegatronGPT2LMHeadModel.from_pretrained(stock)))


def test_a_tp_directory_is_read_by_slices_at_another_degree(pool: Pool, stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches resharding that gathers: four ranks read their boxes out of what two ranks saved."""
    pool(2).run(save_distributed, stock_dir("base"), tmp_path / "tp2", 2)
    pool(4).run(_check_reads_of_another_degree, stock_dir("base"), tmp_path / "tp2")


def _load_another_head(directory: Path, tp_size: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    torch.manual_seed(7 if rank() == 0 else 8)
    model, info = MegatronGPT2ForTokenClassification.from_pretrained(
        directory, num_labels=3, distributed_config=layout(tp_size), output_loading_info=True
    )
    return full_weights(model), info


def test_a_new_head_is_the_same_at_every_degree(pool: Pool, stock_dir: StockDir) -> None:
    """Catches a fresh classifier that every rank draws for itself, and a base model that is not loaded under it."""
    ((expected, info),) = run_at(pool, 1, _load_another_head, stock_dir("base"), 1)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert 0 < expected["classifier.weight"].std() < 0.03
    stored = full_weights(MegatronGPT2LMHeadModel.from_pretrained(stock_dir("base")))
    assert_all_equal({**expected, **stored}, expected)
    for weights, rank_info in run_at(pool, 2, _load_another_head, stock_dir("base"), 2):
        assert_all_equal(weights, expected)
        assert rank_info["missing_keys"] == info["missing_keys"]


def _load_mismatched(directory: Path, tp_size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model = MegatronGPT2LMHeadModel.from_pretrained(
        directory, vocab_size=132, ignore_mismatched_sizes=True, distributed_config=layout(tp_size)
    )
    return full_weights(model)


def test_ignored_mismatches_are_ignored_on_all_ranks(pool: Pool, stock_dir: StockDir) -> None:
    """Catches ranks that compare their own slice: 131 and 132 rows both give rank 0 of two 66 of them."""
    (expected,) = run_at(pool, 1, _load_mismatched, stock_dir("base"), 1)
    assert expected["transformer.wte.weight"].shape == (132, 48)
    for weights in run_at(pool, 2, _load_mismatched, stock_dir("base"), 2):
        assert_all_equal(weights, expected)
