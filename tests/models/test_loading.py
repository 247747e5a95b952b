"""Loading: each rank reads its own slices of the files and holds its own part of the model."""

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hf_megatron.checkpoint import LazyTensor, read_header
from hf_megatron.partition import Box, Replicated
from tests.live import on_live_ranks
from tests.models.architectures import ARCHITECTURES, GPT2, POST, PRE, H, ModelCase, StockDir
from tests.models.reference import Pool, Tensors, assert_all_equal, full_weights, rank
from tests.tiers import cases

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


def _check_reads(case: ModelCase, directory: Path, tp_size: int) -> Tensors:
    """The weights that were loaded, once it is certain that no rank read or holds more than its part."""
    with _recorded_reads() as reads:
        model = case.load(directory, tp_size, dtype=torch.float64)
    tensors = case.table.tensors(model.config.to_dict(), case.table.classes[0])
    assert reads.keys() == tensors.keys()
    share, whole = 0, 0
    for name, tensor in tensors.items():
        expected = list(tensor.spec.boxes(tensor.shape, tp_size, rank()))
        assert reads[name] == expected, f"{name}: read {reads[name]}, expected {expected}"
        held = model.get_parameter(name).to_local()
        assert held.untyped_storage().nbytes() == held.nbytes == 8 * sum(box.numel for box in expected), name
        if not isinstance(tensor.spec, Replicated):
            share, whole = share + held.numel(), whole + Box.whole(tensor.shape).numel
    assert abs(share / whole - 1 / tp_size) < 0.02, f"holds {share} of {whole}"
    return full_weights(model)


@cases(
    "case, variant, tp_size",
    (
        *itertools.product(ARCHITECTURES, ("base", "untied"), (2, 4)),
        *itertools.product((GPT2,), ("uneven_n_inner", "shared_heads"), (2, 4)),
    ),
    [(GPT2, "base", 2), (GPT2, "shared_heads", 4), (GPT2, "uneven_n_inner", 4), (PRE, "base", 4), (POST, "untied", 2)],
)
def test_ranks_read_their_slices(pool: Pool, stock_dir: StockDir, case: ModelCase, variant: str, tp_size: int) -> None:
    """Catches a rank that reads a tensor whole to keep a part, holds a view of it, or reads anything twice."""
    pool(tp_size).run(_check_reads, case, stock_dir(case, None, variant), tp_size)


@pytest.mark.parametrize("case", [GPT2, POST])
@on_live_ranks(4)
def test_under_fsdp_a_rank_reads_its_block_only(stock_dir: StockDir, case: ModelCase) -> None:
    """Catches reading along one dimension of the mesh only: every rank of a TP x FSDP mesh has a block of its own."""
    with _recorded_reads() as reads:
        model = case.load(stock_dir(case), 2, fsdp_size=2)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        shape, _ = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        assert sum(box.numel for box in reads[name]) == torch.Size(shape).numel(), f"{name}: read {reads[name]}"


@pytest.mark.parametrize("case", [GPT2, POST])
def test_a_tp_directory_is_read_by_slices(pool: Pool, stock_dir: StockDir, tmp_path: Path, case: ModelCase) -> None:
    """Catches resharding that gathers: four ranks read their boxes out of what two ranks saved."""
    pool(2).run(case.save_distributed, stock_dir(case), tmp_path / "tp2", 2)
    expected = full_weights(case.load(stock_dir(case), dtype=torch.float64))
    for weights in pool(4).run(_check_reads, case, tmp_path / "tp2", 4):
        assert_all_equal(weights, expected)


@pytest.mark.parametrize("distributed_checkpoint", [False, True])
@pytest.mark.parametrize("disable_mmap", [False, True])
def test_a_model_is_saved_where_it_was_loaded(
    stock_dir: StockDir, tmp_path: Path, distributed_checkpoint: bool, disable_mmap: bool
) -> None:
    """Catches a save that cuts off the files in which the weights still lie, and ``disable_mmap`` without effect."""
    GPT2.load(stock_dir()).save_pretrained(tmp_path, distributed_checkpoint=distributed_checkpoint)
    model = GPT2.load(tmp_path, disable_mmap=disable_mmap)
    # Where the header ends decides whether a file of so few bytes can be mapped as it is needed.
    (file,) = tmp_path.glob("*.safetensors")
    can_be_mapped = any(not start % 16 for _, _, start, _ in read_header(file).tensors.values())
    assert (str(file) in Path("/proc/self/maps").read_text()) == (can_be_mapped and not disable_mmap)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    trained = {name: weight.clone() for name, weight in full_weights(model).items()}
    model.save_pretrained(tmp_path, distributed_checkpoint=distributed_checkpoint)
    assert_all_equal(full_weights(model), trained)
    assert_all_equal(full_weights(GPT2.load(tmp_path)), trained)


def _load_another_head(case: ModelCase, head: str, directory: Path, tp_size: int) -> tuple[Tensors, dict[str, Any]]:
    torch.manual_seed(7 if rank() == 0 else 8)
    model, info = case.load(directory, tp_size, head, output_loading_info=True)
    return full_weights(model), info


_OTHER_HEADS = [(case, head) for case in ARCHITECTURES for head in case.heads if head != case.language_model]


@cases(
    "case, head",
    _OTHER_HEADS,
    [
        *((GPT2, head) for head in ("Model", "ForTokenClassification")),
        *((PRE, head) for head in ("Model", "ForQuestionAnswering")),
        (POST, "ForPreTraining"),
    ],
)
def test_another_head_is_put_on_the_stored_body(pool: Pool, stock_dir: StockDir, case: ModelCase, head: str) -> None:
    """Catches a fresh head or pooler that every rank draws for itself, and a body that is not loaded under it."""
    directory = stock_dir(case, case.language_model)
    expected, info = _load_another_head(case, head, directory, 1)
    _, stock_info = case.stock(head).from_pretrained(directory, output_loading_info=True)
    # Tied parameters are ones of the stock classes only.
    assert info["missing_keys"] == stock_info["missing_keys"] - case.tied.keys()
    stored = load_file(directory / "model.safetensors")
    for name, value in expected.items():
        stored_name = name if head != "Model" else f"{case.table.base_prefix}.{name}"
        if stored_name in stored:
            assert torch.equal(value, stored[stored_name]), name
        else:
            assert name in info["missing_keys"]
            assert name.endswith("bias") or 0 < value.std() < 0.03
    for weights, rank_info in pool(2).run(_load_another_head, case, head, directory, 2):
        assert_all_equal(weights, expected)
        assert rank_info["missing_keys"] == info["missing_keys"]


@on_live_ranks(2)
def test_ignored_mismatches_are_ignored_on_all_ranks(stock_dir: StockDir) -> None:
    """Catches ranks that compare their own slice: 131 and 132 rows both give rank 0 of two 66 of them."""
    found = []
    for tp_size in (1, 2):
        torch.manual_seed(7)
        found.append(full_weights(GPT2.load(stock_dir(), tp_size, vocab_size=132, ignore_mismatched_sizes=True)))
    assert found[0][GPT2.embedding].shape == (132, H)
    assert_all_equal(found[1], found[0])


@pytest.mark.parametrize("case", ARCHITECTURES)
@on_live_ranks(2)
def test_a_whole_checkpoint_loads_without_a_word(stock_dir: StockDir, case: ModelCase) -> None:
    """Catches warnings that mean nothing, such as of a plan for the pooler in a model that has none."""
    directories = {head: stock_dir(case, head) for head in case.heads}
    keeper = BufferingHandler(1000)
    keeper.setLevel(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "hf_megatron")]
    for logger in loggers:
        logger.addHandler(keeper)
    for head, directory in directories.items():
        case.load(directory, 2, head)
    for logger in loggers:
        logger.removeHandler(keeper)
    messages = [record.getMessage() for record in keeper.buffer]
    assert messages == [], messages
