from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from hf_megatron.architectures import GPT2, table_for
from hf_megatron.checkpoint import canonicalise, model_class_of, open_checkpoint, read_header, require_complete
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, UnsupportedError
from hf_megatron.partition import Box, Replicated, chunk_range
from tests.checkpoint.directories import (
    BERT_CONFIG,
    CONFIG,
    SHARD_NAME,
    Placed,
    Tensors,
    model_tensors,
    tp_boxes,
    write_config,
    write_shard,
    write_tp,
)
from tests.distributed import RankPool


def assert_holds(directory: Path, tensors: Tensors) -> None:
    checkpoint = open_checkpoint(directory)
    assert checkpoint.format == "tp"
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        stored = checkpoint.tensors[name]
        assert stored.shape == tuple(tensor.shape)
        assert torch.equal(stored.read(), tensor), name
        # A part that crosses the borders of pieces.
        part = tuple(slice(size // 3, size) for size in tensor.shape)
        assert torch.equal(stored[part], tensor[part]), name


def save_from_ranks(directory: Path) -> None:
    """Save as ranks of an FSDP x TP mesh do it in transformers, with torch's distributed checkpoint writer."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    state: dict[str, Any] = extra_tensors()
    state["short"] = distribute_tensor(state["short"], mesh, [Shard(0), Replicate()], src_data_rank=None)
    for name, tensor in model_tensors().items():
        spec = GPT2.spec_of(name)
        tp: Placement = Replicate() if isinstance(spec, Replicated) else Shard(getattr(spec, "dim"))  # noqa: B009
        state[name] = distribute_tensor(tensor, mesh, [Shard(0), tp], src_data_rank=None)
    writer = HuggingFaceStorageWriter(path=str(directory), save_distributed=True, enable_consolidation=False)
    save(state, storage_writer=writer)


def extra_tensors() -> Tensors:
    """Tensors whose layout on disk is peculiar: a scalar, one cut so that a rank holds nothing, a plain bfloat16."""
    return {"scalar": torch.tensor(3.0), "short": torch.tensor([7.0]), "plain": torch.arange(6).view(2, 3).bfloat16()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 7])
def test_every_degree_is_read(tmp_path: Path, tp_size: int, dtype: torch.dtype) -> None:
    """Catches pieces put together in the order of the files, or in float32, and full shapes of the first piece."""
    tensors = model_tensors(dtype=dtype)
    write_tp(tmp_path, tensors, tp_size)
    assert_holds(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.tp_size, len(checkpoint.files)) == (tp_size, tp_size)


# Of the first two, a classifier has three rows and the other one.
_BERTS = ["BertForSequenceClassification", "BertForMultipleChoice", "MegatronBertForMaskedLM", "BertForPreTraining"]


@pytest.mark.parametrize(
    "config",
    [
        *(
            {**CONFIG, "model_type": "megatron_gpt2", "architectures": [name.ours], "tie_word_embeddings": False}
            for name in GPT2.classes
        ),
        *({**BERT_CONFIG, "architectures": [name]} for name in _BERTS),
    ],
    ids=lambda config: config["architectures"][0],
)
def test_every_class_is_read(tmp_path: Path, config: dict[str, Any]) -> None:
    """Catches a head's tensors missed, the base prefix expected where the class has none, or another head's shape."""
    tensors, table = model_tensors(config), table_for(config)
    write_tp(tmp_path, tensors, 2, config)
    assert_holds(tmp_path, tensors)
    result = canonicalise(open_checkpoint(tmp_path).tensors, table, config, model_class_of(table, config))
    require_complete(result)
    assert list(result.tensors) == list(tensors)


def test_what_a_mesh_of_two_dimensions_saves_is_read(tmp_path: Path, pool: Callable[[int], RankPool]) -> None:
    """Catches boxes cut in two dimensions, empty pieces, and scalars, all of which FSDP x TP leaves on disk."""
    pool(4).run(save_from_ranks, tmp_path)
    write_config(tmp_path)
    assert_holds(tmp_path, {**model_tensors(), **extra_tensors()})
    checkpoint = open_checkpoint(tmp_path)
    boxes = [piece.box for piece in checkpoint.tensors["transformer.h.0.mlp.c_fc.weight"].pieces]
    assert {box.offset for box in boxes} == {(0, 0), (0, 16), (4, 0), (4, 16)}
    assert any("short" in read_header(file).tensors for file in checkpoint.files[2:]), "no empty piece was stored"
    assert len(checkpoint.tensors["short"].pieces) == 1


@pytest.mark.parametrize(("tp_size", "lost"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 3), (4, 4)])
def test_a_lost_shard_is_refused(tmp_path: Path, tp_size: int, lost: int) -> None:
    """Catches what stock loads without a word: every cut tensor is wrong, and some are missing."""
    config = {**CONFIG, "n_layer": 1}  # few enough tensors for the list to name all
    tensors = model_tensors(config)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    write_tp(tmp_path, tensors, tp_size, config)
    path = tmp_path / SHARD_NAME.format(lost)
    concerned = set(read_header(path).tensors)
    path.unlink()
    with pytest.raises(CheckpointIncompleteError, match=rf"The {tp_size - 1} shards in .*\n  ") as error:
        open_checkpoint(tmp_path)
    lines = {line.split()[0]: line for line in str(error.value).splitlines()[1:]}
    assert set(lines) == concerned
    for name in concerned:
        is_cut = len(tp_boxes(tensors, tp_size)[name]) > 1
        assert ("is incomplete" if is_cut else "is missing") in lines[name]


@pytest.mark.parametrize(("before", "after"), [(4, 2), (3, 2), (4, 1), (2, 1)])
def test_stale_shards_of_another_degree_are_refused(tmp_path: Path, before: int, after: int) -> None:
    """Catches a save at a lower degree over one at a higher: stock mixes the shards that were not overwritten in."""
    config = {**CONFIG, "n_layer": 1}  # few enough tensors for the list to name all
    tensors = model_tensors(config)
    write_tp(tmp_path, tensors, before, config)
    write_tp(tmp_path, tensors, after, config)
    with pytest.raises(CheckpointIncompleteError, match=r"wte\.weight is stored twice") as error:
        open_checkpoint(tmp_path)
    concerned = {line.split()[0] for line in str(error.value).splitlines()[1:]}
    stale = [read_header(tmp_path / SHARD_NAME.format(rank + 1)).tensors for rank in range(after, before)]
    assert concerned == {name for shard in stale for name in shard}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
)
def test_shards_beside_whole_weights_are_refused(tmp_path: Path, name: str) -> None:
    """Catches two models in one directory, of which stock mixes the tensors."""
    tensors = model_tensors()
    write_tp(tmp_path, tensors, tp_size=2)
    if name == "model.safetensors":
        save_file(tensors, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointFormatError, match=f"both .*2 in all.* and {name}"):
        open_checkpoint(tmp_path)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    """Catches full shapes inferred from the pieces, which makes any set of shards look complete."""
    write_tp(tmp_path, model_tensors(), tp_size=2)
    write_config(tmp_path, {**CONFIG, "vocab_size": 132, "n_positions": 15})
    with pytest.raises(CheckpointIncompleteError) as error:
        open_checkpoint(tmp_path)
    assert "transformer.wte.weight of shape [132, 8] is incomplete: 1048 of 1056 elements" in str(error.value)
    assert "transformer.wpe.weight has a piece of shape [16, 8]" in str(error.value)


def test_gaps_in_tensors_that_no_table_knows_are_refused(tmp_path: Path) -> None:
    """Catches the check skipped for names that will be reported as unknown only later, if at all."""
    tensors = {**model_tensors(), "extra": torch.zeros(9, 2)}
    placed = tp_boxes(model_tensors(), 3)
    rows = [chunk_range(9, 3, rank) for rank in range(3)]
    placed["extra"] = [(rank, Box.whole((9, 2)).narrowed(0, *rows[rank])) for rank in (0, 2)]
    write_tp(tmp_path, tensors, 3, placed=placed)
    with pytest.raises(CheckpointIncompleteError, match=r"extra of shape \[9, 2\] is incomplete: 12 of 18"):
        open_checkpoint(tmp_path)


def test_pieces_of_different_dtypes_are_refused(tmp_path: Path) -> None:
    """Catches shards of two saves mixed whose boxes happen to fit: bits of one dtype would be read as another."""
    write_tp(tmp_path, model_tensors(dtype=torch.bfloat16), tp_size=2)
    second = (tmp_path / SHARD_NAME.format(2)).read_bytes()
    write_tp(tmp_path, model_tensors(), tp_size=2)
    (tmp_path / SHARD_NAME.format(2)).write_bytes(second)
    with pytest.raises(CheckpointIncompleteError, match=r"wte\.weight is stored as BF16 and F32"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "info", [None, "{", "[]", '{"x": {}}', '{"x": {"saved_offsets": [0]}}', '{"x": {"saved_offsets": [-1, 0]}}']
)
def test_shards_that_do_not_say_where_they_start_are_refused(tmp_path: Path, info: str | None) -> None:
    """Catches a shard of another tool, or a damaged one, taken to start at the origin."""
    write_config(tmp_path)
    metadata = {} if info is None else {"DCP_SHARDING_INFO": info}
    save_file({"x": torch.zeros(2, 2)}, tmp_path / SHARD_NAME.format(1), metadata=metadata)
    with pytest.raises(CheckpointFormatError, match=r"start"):
        open_checkpoint(tmp_path)


def test_an_architecture_without_a_table_is_refused(tmp_path: Path) -> None:
    """Catches shards opened whose completeness nobody can check."""
    write_config(tmp_path, {"model_type": "llama"})
    write_shard(tmp_path / SHARD_NAME.format(1), {"x": torch.zeros(2)}, {"x": [0]})
    with pytest.raises(UnsupportedError, match=r"'llama'.*not supported"):
        open_checkpoint(tmp_path)


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    """Catches an optimizer's or adapter's file read as a shard."""
    tensors = model_tensors()
    write_tp(tmp_path, tensors, tp_size=2)
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    placed: Placed = {"y": [(0, Box((0,), (1,)))]}
    write_tp(tmp_path / "optimizer", {"y": torch.zeros(1)}, 1, placed=placed)
    assert_holds(tmp_path, tensors)
