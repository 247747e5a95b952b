"""Stock models become checkpoints of Megatron-core: names, places, values, arguments, and torch's own reader."""

from __future__ import annotations

import argparse
import io
import json
import logging
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from hf_megatron.errors import DestinationError, PartitionError, UnsupportedError
from hf_megatron_conversion import convert, tensors, verify
from tests.conversion.checkpoints import hub_bytes, read_config, save_stock
from tests.conversion.commands import Commands
from tests.conversion.megatron_core.generator import Distributed, content_of, write
from tests.conversion.megatron_lm.generator import VOCAB, flat_state, make_weights

_SMALL: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0}
_BERT = {**_SMALL, "hidden_size": 32, "num_attention_heads": 8, "max_position_embeddings": 24}
_BERT |= {"num_hidden_layers": 4, "intermediate_size": 48}
_GPT = {**_SMALL, "n_embd": 32, "n_head": 8, "n_positions": 24, "n_layer": 4, "n_inner": 48}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2}
_STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (transformers.GPT2LMHeadModel, _GPT),
    "gpt2-untied": (transformers.GPT2LMHeadModel, {**_GPT, "tie_word_embeddings": False}),
    "gpt2-exact": (transformers.GPT2LMHeadModel, {**_GPT, "activation_function": "gelu"}),
    "bert": (transformers.MegatronBertForPreTraining, _BERT),
    "masked-lm": (transformers.MegatronBertForMaskedLM, _BERT),
    "classifier": (transformers.GPT2ForSequenceClassification, _GPT),
    "original-bert": (transformers.BertForPreTraining, _BERT),
}
_NONE = b"\x80\x04N."
_Shapes = dict[str, tuple[int, ...]]

# What Megatron-core 0.16 calls the tensors of a model with hidden size 32, MLP 48, vocabulary 101 (padded to 128) and
# 24 positions, and their shapes, in a layer and outside.
_LAYER: _Shapes = {
    "self_attention.linear_qkv.layer_norm_weight": (32,),
    "self_attention.linear_qkv.layer_norm_bias": (32,),
    "self_attention.linear_qkv.weight": (96, 32),
    "self_attention.linear_qkv.bias": (96,),
    "self_attention.linear_proj.weight": (32, 32),
    "self_attention.linear_proj.bias": (32,),
    "mlp.linear_fc1.layer_norm_weight": (32,),
    "mlp.linear_fc1.layer_norm_bias": (32,),
    "mlp.linear_fc1.weight": (48, 32),
    "mlp.linear_fc1.bias": (48,),
    "mlp.linear_fc2.weight": (32, 48),
    "mlp.linear_fc2.bias": (32,),
}
_EMBEDDING: _Shapes = {"embedding.word_embeddings.weight": (128, 32), "embedding.position_embeddings.weight": (24, 32)}
_TYPES: _Shapes = {"embedding.tokentype_embeddings.weight": (2, 32)}
_LM_HEAD: _Shapes = {
    "lm_head.dense.weight": (32, 32),
    "lm_head.dense.bias": (32,),
    "lm_head.layer_norm.weight": (32,),
    "lm_head.layer_norm.bias": (32,),
    "output_layer.bias": (128,),
}
_POOLER: _Shapes = {"pooler.dense.weight": (32, 32), "pooler.dense.bias": (32,)}
_BINARY_HEAD: _Shapes = {"binary_head.weight": (2, 32), "binary_head.bias": (2,)}
_OUTSIDE: dict[str, tuple[str, _Shapes]] = {
    "gpt2": ("decoder", _EMBEDDING),
    "gpt2-untied": ("decoder", {**_EMBEDDING, "output_layer.weight": (128, 32)}),
    "bert": ("encoder", {**_EMBEDDING, **_TYPES, **_LM_HEAD, **_POOLER, **_BINARY_HEAD}),
    # Token types have to have a second head beside them.
    "masked-lm": ("encoder", {**_EMBEDDING, **_TYPES, **_LM_HEAD, **_POOLER, **_BINARY_HEAD}),
}
_LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def _stock(directory: Path, kind: str, **changes: Any) -> Path:
    """Save a stock model whose tensors all differ."""
    model_class, entries = _STOCK[kind]
    return save_stock(directory, model_class=model_class, **{**entries, **changes})


def _index(directory: Path) -> Metadata:
    """The index, unpickled as torch's own classes."""
    metadata: Metadata = dcp.FileSystemReader(directory / "release").read_metadata()
    assert isinstance(metadata, Metadata)
    return metadata


def _load(path: Path) -> dict[str, Any]:
    """What Megatron-LM of today would load: a dictionary of nothing that ``weights_only`` refuses."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return content


@pytest.mark.parametrize("kind", _OUTSIDE)
def test_names_shapes_chunks_and_objects(tmp_path: Path, kind: str) -> None:
    """Catches a key that Megatron-core does not look for, one that it misses, and chunks that are not one per layer."""
    convert(_stock(tmp_path / "hub", kind), tmp_path / "core", to="megatron-core")
    body, outside = _OUTSIDE[kind]
    outside = {**outside, f"{body}.final_layernorm.weight": (32,), f"{body}.final_layernorm.bias": (32,)}
    stacked = {f"{body}.layers.{name}": (4, *shape) for name, shape in _LAYER.items()}
    states = {f"{body}.layers.{module}": 4 for module in (*_LINEAR, "self_attention.core_attention")}
    states |= {f"{body}.final_layernorm": 1} | ({"output_layer": 1} if body == "encoder" else {})
    objects = {f"{name}._extra_state/shard_{i}_{count}" for name, count in states.items() for i in range(count)}
    index = _index(tmp_path / "core")
    assert index.storage_data is not None
    stored = index.state_dict_metadata
    sizes = {name: tuple(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    assert sizes == {**outside, **stacked}
    assert {name for name, entry in stored.items() if isinstance(entry, BytesStorageMetadata)} == objects
    places = {MetadataIndex(name) for name in objects}
    for name, entry in stored.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        assert entry.properties.dtype is torch.float32
        size = tuple(entry.size)
        parts = [((i, *[0] * len(size[1:])), (1, *size[1:])) for i in range(4)]
        parts = parts if name in stacked else [((0,) * len(size), size)]
        assert [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks] == parts
        places |= {MetadataIndex(name, torch.Size(offset)) for offset, _ in parts}
    assert set(index.storage_data) == places
    assert all(type(place.offset) in (torch.Size, type(None)) for place in index.storage_data)
    for name in objects:
        (value,) = torch.load(io.BytesIO(_record(tmp_path / "core", index, MetadataIndex(name))), weights_only=True)
        assert bytes(value.numpy()) == pickle.dumps(None, 4) == _NONE, name


def _record(directory: Path, index: Metadata, place: MetadataIndex) -> bytes:
    assert index.storage_data is not None
    found = index.storage_data[place]
    data: bytes = (directory / "release" / found.relative_path).read_bytes()
    assert found.offset + found.length <= len(data)
    return data[found.offset : found.offset + found.length]


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("max_shard_size", [None, 20_000])
def test_records_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool, max_shard_size: int | None
) -> None:
    """Catches positions counted from the file's start, gaps, wrong alignment, and 32 bits in a record of over 4 GB."""
    if is_large:  # with a lower limit every field is the large one
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    source = _stock(tmp_path / "hub", "bert")
    convert(source, tmp_path / "core", to="megatron-core", max_shard_size=max_shard_size)
    index = _index(tmp_path / "core")
    assert index.storage_data is not None
    ends: dict[str, list[tuple[int, int]]] = {}
    for place, found in index.storage_data.items():
        ends.setdefault(found.relative_path, []).append((found.offset, found.offset + found.length))
        with zipfile.ZipFile(io.BytesIO(_record(tmp_path / "core", index, place))) as archive:
            assert archive.testzip() is None
            assert archive.infolist()[0].header_offset == 0
            data = archive.getinfo("archive/data/0")
            header = archive.fp.seek(data.header_offset + 26)  # type: ignore[union-attr]
            lengths = archive.fp.read(4)  # type: ignore[union-attr]
            start = header + 4 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            assert start % 64 == 0
    assert (len(ends) == 1) == (max_shard_size is None)
    for number, file in enumerate(ends):
        assert file == f"__0_{number}.distcp"
        size = (tmp_path / "core/release" / file).stat().st_size
        assert [0, *(end for _, end in sorted(ends[file]))] == [*(start for start, _ in sorted(ends[file])), size]
        assert max_shard_size is None or size <= max_shard_size
    monkeypatch.undo()
    assert verify(source, tmp_path / "core").equal


_GENERATED = [
    Distributed(),
    Distributed(is_untied=True, gelu="erf"),
    Distributed(kind="bert"),
    Distributed(kind="bert", has_binary_head=False),
    Distributed(kind="bert", dtype=torch.bfloat16),
    Distributed(layers=1),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # which is what it is meant for
@pytest.mark.parametrize("variant", _GENERATED)
def test_torch_reads_what_megatron_core_would_have_saved(tmp_path: Path, variant: Distributed) -> None:
    """Catches values in the wrong row, layer or order, and a file that only this package reads."""
    weights = make_weights(variant)
    convert(write(tmp_path / "source", variant, weights), tmp_path / "hub", to="hub", vocab_size=VOCAB)
    convert(tmp_path / "hub", tmp_path / "core", to="megatron-core")
    index = _index(tmp_path / "core").state_dict_metadata
    sizes = {name: entry.size for name, entry in index.items() if isinstance(entry, TensorStorageMetadata)}
    loaded = {name: torch.empty(size, dtype=variant.dtype) for name, size in sizes.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "core/release", no_dist=True)
    expected = content_of(replace(variant, tp=1), weights)
    assert set(loaded) == set(expected.chunks)
    for name, chunks in expected.chunks.items():
        for offset, part in chunks:
            size = (VOCAB, *part.shape[1:]) if _is_padded(name) else part.shape
            there = tuple(slice(a, a + b) for a, b in zip(offset, size, strict=True))
            here = tuple(slice(0, b) for b in size)
            assert torch.equal(loaded[name][there], part[here]), (name, offset)
    words, bias = loaded["embedding.word_embeddings.weight"], loaded.get("output_layer.bias")
    assert len(words) == 128
    assert not words[VOCAB:].any()
    assert bias is None or bool((bias[VOCAB:] == torch.tensor(-10000.0, dtype=variant.dtype)).all())


def _is_padded(name: str) -> bool:
    return name in ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")


def test_the_arguments_are_megatron_s(tmp_path: Path) -> None:
    """Catches what keeps Megatron-LM from loading: its checks of arguments, an optimizer that it would ask for."""
    for kind, is_tanh in (("gpt2", True), ("gpt2-exact", False), ("bert", False)):
        convert(_stock(tmp_path / kind, kind), tmp_path / f"core-{kind}", to="megatron-core")
        common = _load(tmp_path / f"core-{kind}/release/common.pt")
        arguments = vars(common.pop("args"))
        assert common == {"checkpoint_version": 3.0, "iteration": 0}
        # The fused gelu is the tanh form, and the only one that Megatron-core has; openai_gelu it does not know.
        assert (arguments["bias_gelu_fusion"], arguments["openai_gelu"]) == (is_tanh, False)
        expected = {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 8,
            "ffn_hidden_size": 48,
            "add_position_embedding": True,
            "max_position_embeddings": 24,
            "make_vocab_size_divisible_by": 128,
            "padded_vocab_size": 128,
            "tokenizer_type": "BertWordPieceLowerCase" if kind == "bert" else "GPT2BPETokenizer",
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "ckpt_format": "torch_dist",
            "use_dist_ckpt": True,
            "use_mcore_models": True,
            "transformer_impl": "transformer_engine",
            "no_save_optim": True,
            "no_save_rng": True,
        }
        assert {name: arguments[name] for name in expected} == expected
        assert (tmp_path / f"core-{kind}/latest_checkpointed_iteration.txt").read_text() == "release"
        assert json.loads((tmp_path / f"core-{kind}/release/metadata.json").read_text()) == {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (4, 4)])
@pytest.mark.parametrize("names", ["te", "core"])
@pytest.mark.parametrize("kind", ["gpt", "gpt-untied", "bert"])
def test_ranks_and_stages(tmp_path: Path, kind: str, names: str, tp: int, pp: int) -> None:
    """Catches a layer in the wrong stage or counted through, a head without its weight, and what modules ask for."""
    model = {"is_untied": True} if kind == "gpt-untied" else {"kind": kind}
    variant = Distributed(layers=4, divisor=128, tp=tp, pp=pp, names=names, **model)
    weights = make_weights(variant)
    convert(write(tmp_path / "source", replace(variant, names="te"), weights), tmp_path / "hub", to="hub")
    options: dict[str, Any] = {"container": "torch", "tp_size": tp, "pp_size": pp}
    options |= {"transformer_impl": "local"} if names == "core" else {}
    convert(tmp_path / "hub", tmp_path / "core", to="megatron-core", vocab_size=None, **options)
    body = "encoder" if kind == "bert" else "decoder"
    for rank in range(tp):
        for stage in range(pp):
            suffix = f"_{stage:03d}" if pp > 1 else ""
            path = tmp_path / f"core/release/mp_rank_{rank:02d}{suffix}/model_optim_rng.pt"
            content = _load(path)
            ends = {"is_first": stage == 0, "is_last": stage == pp - 1}
            layers = range(stage * 4 // pp, (stage + 1) * 4 // pp)
            expected = flat_state(variant, weights, rank, layers, **ends)
            expected = {name: part for name, part in expected.items() if not name.endswith("_extra_state")}
            states = {name for name in content["model"] if name.endswith("._extra_state")}
            modules = [f"{body}.layers.{n}.{module}" for n in range(4 // pp) for module in _LINEAR]
            if names == "te":
                modules += [f"{body}.layers.{n}.self_attention.core_attention" for n in range(4 // pp)]
                modules += [f"{body}.final_layernorm"] if ends["is_last"] else []
            assert states == {f"{name}._extra_state" for name in [*modules, *["output_layer"] * ends["is_last"]]}
            for name in states:
                value = content["model"].pop(name)
                assert value is None or bytes(value.numpy()) == _NONE
                assert (value is None) == (names == "core" or name == "output_layer._extra_state")
            assert set(content["model"]) == set(expected)
            for name, part in expected.items():
                assert torch.equal(content["model"][name], part), name
            arguments = content["args"]
            assert (arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size) == (tp, pp)
            assert (arguments.ckpt_format, arguments.padded_vocab_size) == ("torch", variant.padded_vocab)
            assert (content["checkpoint_version"], content["iteration"]) == (3.0, 0)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt2-untied", "bert", "masked-lm"])
def test_there_and_back_is_bit_exact(tmp_path: Path, kind: str, dtype: str | None) -> None:
    """Catches a cut, an order or a padding that writing and reading do not see alike, and entries lost on the way."""
    source = _stock(tmp_path / "float32", kind)
    if dtype is not None:
        convert(source, tmp_path / "hub", to="hub", dtype=dtype)
        source = tmp_path / "hub"
    steps: list[dict[str, Any]] = [{}, {"container": "torch", "tp_size": 2, "pp_size": 2}]
    steps += [{"container": "torch", "tp_size": 4, "transformer_impl": "local"}, {"max_shard_size": "30kB"}]
    here = source
    for number, options in enumerate(steps):
        result = convert(here, tmp_path / f"{number}", to="megatron-core", verify=True, **options)
        assert result.verified
        here = tmp_path / f"{number}"
    assert convert(here, tmp_path / "back", to="hub", verify=True).verified
    assert hub_bytes(source) == hub_bytes(tmp_path / "back")
    before, after = read_config(source), read_config(tmp_path / "back")
    assert {name: after[name] for name in before if name in after} == before


def test_small_slices_and_dry_runs_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches large tensors, which are read in parts, cut elsewhere than small ones, and sizes not known before."""
    source = _stock(tmp_path / "hub", "gpt2")
    for options in ({}, {"container": "torch", "tp_size": 4, "pp_size": 2}):
        written = []
        for size in (2**24, 70):
            monkeypatch.setattr(tensors, "SLICE_BYTES", size)
            target = tmp_path / f"{len(options)}-{size}"
            planned = convert(source, target, to="megatron-core", dry_run=True, **options)  # type: ignore[arg-type]
            result = convert(source, target, to="megatron-core", **options)  # type: ignore[arg-type]
            assert planned.files == result.files
            assert {name: (target / name).stat().st_size for name in result.files} == planned.files
            written.append(result.sha256)
        assert written[0] == written[1]


_TORCH = {"to": "megatron-core", "container": "torch"}


@pytest.mark.parametrize(
    ("kind", "change", "options", "told"),
    [
        ("gpt2", {}, {"to": "megatron-core", "tp_size": 2}, "tp_size=2 .* torch_dist .* the same for every degree"),
        ("gpt2", {}, {"to": "megatron-core", "pp_size": 2}, "pp_size=2 .* container torch"),
        ("gpt2", {}, {"to": "megatron-core", "transformer_impl": "local"}, "transformer_impl=local .* both implement"),
        ("gpt2", {}, {"to": "megatron-core", "container": "zarr"}, "container='zarr' is not one of torch_dist, torch"),
        ("gpt2", {}, {"to": "megatron-lm", "tp_size": 2, "pp_size": 2}, "pp_size=2 .* not for megatron-lm"),
        ("gpt2", {}, {"to": "hub", "container": "torch"}, "container=torch .* is for megatron-core directories"),
        ("gpt2", {}, {"to": "tp", "tp_size": 2, "transformer_impl": "local"}, "transformer_impl=local .* not for tp"),
        ("gpt2", {}, {**_TORCH, "transformer_impl": "apex"}, "'apex' is not one of local, transformer_engine"),
        ("gpt2", {}, {**_TORCH}, "needs a degree"),
        ("gpt2", {}, {**_TORCH, "tp_size": 1, "pp_size": 3}, "num_hidden_layers=4 .* pp_size=3 .* one of 1, 2, 4\\."),
        ("gpt2", {}, {**_TORCH, "tp_size": 1, "pp_size": 0}, "pp_size=0"),
        ("gpt2", {}, {**_TORCH, "tp_size": 3}, "num_attention_heads=8 .* tp_size=3"),
        ("gpt2", {"n_inner": 44}, {**_TORCH, "tp_size": 8}, "intermediate_size=44 .* choose one of 1, 2, 4\\."),
        ("gpt2", {}, {**_TORCH, "tp_size": 1, "max_shard_size": "1GB"}, "the container torch has one file per rank"),
        ("original-bert", {}, {"to": "megatron-core"}, "BertForPreTraining, whose LayerNorms stand after"),
        ("bert", {"hidden_act": "gelu_new"}, {"to": "megatron-core"}, "gelu_new in the masked-LM head"),
        ("gpt2", {"activation_function": "relu"}, {"to": "megatron-core"}, "Megatron-core has no such model.*relu"),
        ("gpt2", {"scale_attn_weights": False}, {"to": "megatron-core"}, "scale_attn_weights"),
        ("classifier", {}, {"to": "megatron-core"}, r"a GPT2ForSequenceClassification \(only language models\)"),
    ],
)
def test_what_is_refused(tmp_path: Path, kind: str, change: dict[str, Any], options: dict[str, Any], told: str) -> None:
    """Catches an option that is silently ignored, and a checkpoint with which something else would be computed."""
    source = _stock(tmp_path / "hub", kind, **change)
    with pytest.raises((PartitionError, UnsupportedError), match=f"(?s){told}"):
        convert(source, tmp_path / "core", **options)
    assert not (tmp_path / "core").exists()


def test_replaced_and_told(tmp_path: Path, command: Commands) -> None:
    """Catches options that do not arrive, and a checkpoint of one container that cannot replace one of the other."""
    source, target = _stock(tmp_path / "hub", "gpt2"), tmp_path / "core"
    ranks = ["--container", "torch", "--tp", 2, "--pp", 2, "--transformer-impl", "local"]
    for options, told in ([], ("torch_dist", 1, 1)), (ranks, ("torch", 2, 2)), ([], ("torch_dist", 1, 1)):
        code, result, _ = command.run("convert", source, target, "--to", "megatron-core", "--overwrite", *options)
        assert (code, *(result[name] for name in ("container", "tp_size", "pp_size"))) == (0, *told)
        card = (target / "README.md").read_text()
        assert f"megatron-core, container {told[0]}" in card
        assert ("tensor-parallel degree 2, 2 pipeline stages" in card) == (told[0] == "torch")
    assert sorted(path.name for path in (target / "release").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "common.pt",
        "metadata.json",
    ]
    (target / "release/notes.txt").write_text("mine")
    with pytest.raises(DestinationError, match="release"):
        convert(source, target, to="megatron-core", overwrite=True)


def test_who_loads_the_legacy_form_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches someone who writes the old form and finds that no Megatron of today loads it."""
    caplog.set_level(logging.INFO, "hf_megatron_conversion")
    convert(_stock(tmp_path / "hub", "gpt2"), tmp_path / "legacy", to="megatron-lm", tp_size=1)
    (line,) = (record.message for record in caplog.records if "legacy" in record.message)
    assert "core 0.17" in line
    assert "--to megatron-core" in line
    caplog.clear()
    convert(tmp_path / "legacy", tmp_path / "core", to="megatron-core")
    assert "legacy" not in caplog.text
