"""Damaged, hostile and foreign distributed checkpoints: refused by ``inspect`` and ``convert``, and nothing runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from hf_megatron.errors import CheckpointError, UnsupportedError
from hf_megatron_conversion import convert, inspect
from tests.conversion.checkpoints import save_stock
from tests.conversion.megatron_core.generator import Content, Distributed, content_of, saved, write, write_content
from tests.conversion.megatron_lm.generator import VOCAB, make_weights

_QKV = "decoder.layers.self_attention.linear_qkv.weight"
_WORDS = "embedding.word_embeddings.weight"
_STATE = "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2"
_MOMENT = f"optimizer.state.exp_avg.{_WORDS}"


class _Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def _chunk(content: Content, name: str, number: int, offset: tuple[int, ...] | None, part: torch.Tensor | None) -> None:
    """Change a chunk, or take it away."""
    old_offset, old_part = content.chunks[name].pop(number)
    if offset is not None or part is not None:
        content.chunks[name].append((offset or old_offset, old_part if part is None else part))


def _place(content: Content, name: str, **fields: Any) -> None:
    """Change what the index says of the place of a record."""

    def change(metadata: dcp.Metadata) -> None:
        for index, place in metadata.storage_data.items():
            if index.fqn == name:
                for field, value in fields.items():
                    setattr(place, field, value)
                return

    content.change_metadata = change


def _compressed(content: Content) -> None:
    data = io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(saved(content.chunks[_QKV][0][1])))
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    content.raw_records[f"{_QKV}/0"] = data.getvalue()


def _shared(metadata: dcp.Metadata) -> None:
    places = [index for index in metadata.storage_data if index.fqn == _QKV]
    metadata.storage_data[places[0]] = metadata.storage_data[places[1]]


def _overlapping(metadata: dcp.Metadata) -> None:
    for index, place in list(metadata.storage_data.items())[-1:]:
        metadata.storage_data[index] = _StorageInfo(place.relative_path, place.offset - 8, place.length)


def _twice(content: Content) -> None:
    """A second place for a chunk, which only a pickle can have that Python's dictionaries have not made."""

    def change(metadata: dcp.Metadata) -> None:
        place = metadata.storage_data.pop(dcp.MetadataIndex("rng_state/shard_0_1"))
        metadata.storage_data[dcp.MetadataIndex(_WORDS[:-1] + "T", torch.Size((0, 0)))] = place

    content.change_metadata = change
    content.replaced = (_WORDS[:-1] + "T", _WORDS)


def _many_layers(content: Content) -> None:
    name = "decoder.layers.self_attention.linear_proj.bias"
    content.shapes[name] = (500_001, 1)
    content.chunks[name] = [((0, 0), torch.zeros(500_001, 1))]


def _huge(metadata: dcp.Metadata) -> None:
    stored = metadata.state_dict_metadata[_WORDS]
    assert isinstance(stored, dcp.TensorStorageMetadata)
    stored.size = torch.Size([2**62, 32])


_CASES: dict[str, tuple[Callable[[Content], Any], str]] = {
    "chunks that overlap": (lambda c: _chunk(c, _QKV, 1, (0, 47, 0), None), "overlap"),
    "a gap between chunks": (lambda c: _chunk(c, _QKV, 1, None, None), "is incomplete"),
    "a chunk outside of its tensor": (lambda c: _chunk(c, _QKV, 1, (0, 60, 0), None), "outside of its shape"),
    "a chunk of fewer dimensions": (lambda c: _chunk(c, _QKV, 1, (0, 0), torch.zeros(2, 2)), "2 dimensions where 3"),
    "another shape in the record": (
        lambda c: c.raw_records.update({f"{_QKV}/0": saved(torch.zeros(1, 32, 48))}),
        "32, 48",
    ),
    "another type in the record": (
        lambda c: c.raw_records.update({f"{_QKV}/0": saved(torch.zeros(1, 48, 32).half())}),
        "float16",
    ),
    "no tensor in the record": (lambda c: c.raw_records.update({f"{_QKV}/0": saved([1, 2])}), "no tensor"),
    "values that repeat": (
        lambda c: c.raw_records.update({f"{_QKV}/0": saved_as_is(torch.zeros(1).expand(1, 48, 32))}),
        "repeats its values",
    ),
    "a record cut short": (lambda c: _place(c, _QKV, length=100), "not a file of torch.save"),
    "a record beyond its file": (lambda c: _place(c, _QKV, offset=10**9), "is truncated"),
    "a record of no bytes": (lambda c: _place(c, _QKV, length=0), "not a file of torch.save"),
    "a negative offset": (lambda c: _place(c, _QKV, offset=-5), "not the index"),
    "an offset that is no number": (lambda c: _place(c, _QKV, offset="0"), "not the index"),
    "a file elsewhere": (lambda c: _place(c, _QKV, relative_path="../__0_0.distcp"), "is no .distcp file"),
    "another kind of file": (lambda c: _place(c, _QKV, relative_path="common.pt"), "is no .distcp file"),
    "a file that is missing": (lambda c: _place(c, _QKV, relative_path="__7_0.distcp"), "__7_0.distcp is missing"),
    "a transform": (lambda c: _place(c, _QKV, transform_descriptors=["zstd"]), "transformed"),
    "records that overlap": (lambda c: setattr(c, "change_metadata", _overlapping), "records overlap"),
    "chunks that share a record": (lambda c: setattr(c, "change_metadata", _shared), "share one record"),
    "a chunk with two places": (_twice, "two places"),
    "a chunk without a place": (
        lambda c: setattr(
            c, "change_metadata", lambda m: m.storage_data.pop(dcp.MetadataIndex(_WORDS, torch.Size((0, 0))))
        ),
        "nothing says where",
    ),
    "a compressed record": (_compressed, "compressed"),
    "more elements than can be counted": (lambda c: setattr(c, "change_metadata", _huge), "64 bits"),
    "a name that no model has": (
        lambda c: (c.shapes.update(extra=(2,)), c.chunks.update(extra=[((0,), torch.zeros(2))])),
        "names are not known: extra",
    ),
    "layers that are missing": (lambda c: c.chunks.pop(_QKV), "missing"),
    "another version of the order": (lambda c: c.common.update(checkpoint_version=2.0), "checkpoint_version=2.0"),
    "rotary positions": (
        lambda c: setattr(c.common["args"], "position_embedding_type", "rope"),
        "position_embedding_type",
    ),
    "experts": (lambda c: setattr(c.common["args"], "num_experts", 8), "num_experts=8"),
    "more layers than can be": (_many_layers, "and the limit is 500,000"),
    "another container": (lambda c: c.mark.update(sharded_backend="zarr"), "--ckpt-convert-format torch_dist"),
    "no arguments that are any": (lambda c: setattr(c, "common", [1]), "where common.pt has a dictionary"),
}


def saved_as_is(value: torch.Tensor) -> bytes:
    """What torch.save writes of a view."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _refused(source: Path, directory: Path, expected: str) -> None:
    """Both commands refuse it by an error of ours, and leave nothing."""
    for attempt in (
        lambda: inspect(source),
        lambda: convert(source, directory / "hub", to="hub", vocab_size=VOCAB),
        lambda: convert(source, directory / "hub", to="hub", vocab_size=VOCAB, dry_run=True),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert expected in str(caught.value)
    assert not (directory / "hub").exists()


@pytest.mark.parametrize("name", list(_CASES))
def test_an_index_and_records_that_do_not_fit(tmp_path: Path, name: str) -> None:
    """Catches a check of the index, or of a record against it, that is not made; or a foreign error."""
    content = content_of(Distributed(), make_weights(Distributed()))
    damage, expected = _CASES[name]
    damage(content)
    write_content(tmp_path / "source/iter_0000001", content)
    _refused(tmp_path / "source", tmp_path, expected)


@pytest.mark.parametrize("place", ["index", "chunk", "state", "moment", "common", "common state", "behind the index"])
def test_nothing_runs(tmp_path: Path, place: str) -> None:
    """Catches a pickle that is loaded, or that is not judged because conversion has no use for it."""
    variant = Distributed(has_optimizer=True, common="object" if place == "common state" else "file")
    content = content_of(variant, make_weights(variant))
    evil = _Evil(tmp_path / "ran")
    if place == "index":
        content.change_metadata = lambda metadata: setattr(metadata, "planner_data", evil)
    elif place == "common":
        content.common["args"].evil = evil
    elif place != "behind the index":
        names = {
            "chunk": f"{_QKV}/0",
            "state": _STATE,
            "moment": f"{_MOMENT}/0",
            "common state": "common_state/shard_0_1",
        }
        content.raw_records[names[place]] = saved([evil])
    write_content(tmp_path / "source", content)
    if place == "behind the index":
        with (tmp_path / "source/.metadata").open("ab") as file:
            file.write(pickle.dumps(evil))
    _refused(tmp_path / "source", tmp_path, "behind its pickle" if place == "behind the index" else "os.system")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt", "__0_0.distcp"])
@pytest.mark.parametrize("kind", ["removed", "empty", "half", "text", "directory"])
def test_damaged_files(tmp_path: Path, name: str, kind: str) -> None:
    """Catches foreign errors, and a checkpoint whose arguments are gone taken for one that never had any."""
    source = write(tmp_path / "source", Distributed())
    path = source / "iter_0001000" / name
    data = path.read_bytes()
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind != "removed":
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "text": b"hello, world" * 20}[kind])
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "hub", to="hub", vocab_size=VOCAB)


def test_a_flipped_bit(tmp_path: Path) -> None:
    """Catches damage to a tensor that only the CRC of its record shows."""
    source = write(tmp_path / "source", Distributed())
    content = content_of(Distributed(), make_weights(Distributed()))
    path = source / "iter_0001000/__0_0.distcp"
    data = bytearray(path.read_bytes())
    first = content.chunks[_WORDS][0][1].numpy().tobytes()
    data[data.index(first) + 5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="CRC-32"):
        convert(source, tmp_path / "hub", to="hub", vocab_size=VOCAB)


@pytest.mark.parametrize(("type_", "expected"), [("float8_e4m3fn", "float8"), ("complex64", "complex64")])
def test_types_that_are_not_offered(tmp_path: Path, type_: str, expected: str) -> None:
    """Catches weights of another type than Megatron-LM trains in, read as if they were numbers of ours."""
    content = content_of(Distributed(), make_weights(Distributed()))
    content.chunks[_WORDS] = [(offset, part.to(getattr(torch, type_))) for offset, part in content.chunks[_WORDS]]
    write_content(tmp_path / "source", content)
    with pytest.raises(CheckpointError, match=expected):
        convert(tmp_path / "source", tmp_path / "hub", to="hub", vocab_size=VOCAB)


def test_containers_that_are_not_read(tmp_path: Path) -> None:
    """Catches a directory of another container taken for a damaged one of this."""
    write(tmp_path, replace(Distributed(), common=None))
    place = tmp_path / "iter_0001000"
    (place / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="fsdp_dtensor or torch_dcp"):
        inspect(place)
    (place / "metadata.json").write_text(json.dumps({"sharded_backend": "other"}))
    with pytest.raises(CheckpointError, match="'other'"):
        inspect(tmp_path)


def test_links_that_lead_elsewhere(tmp_path: Path) -> None:
    """Catches somebody else's file converted because a name in the checkpoint is a link to it."""
    source = write(tmp_path / "source", Distributed())
    path = source / "iter_0001000/__0_0.distcp"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        convert(source, tmp_path / "hub", to="hub", vocab_size=VOCAB)


def test_layers_of_several_dtypes(tmp_path: Path) -> None:
    """Catches an index that says of all layers the dtype of the first, so that nobody can read the others."""
    source = save_stock(tmp_path / "hub", n_layer=2)
    stored = load_file(source / "model.safetensors")
    name = "transformer.h.1.ln_1.bias"
    save_file({**stored, name: stored[name].bfloat16()}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="is bfloat16 and that of another layer float32"):
        convert(source, tmp_path / "core", to="megatron-core")
    for options in ({"dtype": "float32"}, {"container": "torch", "tp_size": 1}):
        target = tmp_path / next(iter(options))
        convert(source, target, to="megatron-core", **options)
        convert(target, tmp_path / f"{target.name}-hub", to="hub")
    assert load_file(tmp_path / "container-hub" / "model.safetensors")[name].dtype == torch.bfloat16
