"""Sources that other code would fail on: an error of ours says what is wrong with them, before anything is written."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, GPT2LMHeadModel
from transformers.activations import ACT2FN

from hf_megatron.architectures import GPT2
from hf_megatron.architectures.table import ACTIVATIONS
from hf_megatron.checkpoint import DTYPES, itemsize
from hf_megatron.errors import CheckpointError, DestinationError, HfMegatronError, PartitionError, UnsupportedError
from hf_megatron_conversion import convert, inspect
from tests.conversion.checkpoints import save_stock
from tests.conversion.megatron_lm.generator import Variant, make_weights, write

_CONFIG: dict[str, Any] = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 4}
_CONFIG |= {"n_embd": 8, "n_positions": 6, "vocab_size": 11, "tie_word_embeddings": False}


def _hub(directory: Path, dtype: str = "F32", **config: Any) -> Path:
    """A GPT-2 of random bytes."""
    directory.mkdir()
    merged = {**_CONFIG, **config}
    (directory / "config.json").write_text(json.dumps(merged))
    sizes = {name: value for name, value in merged.items() if name.startswith(("n_", "vocab", "tie"))}
    rng = random.Random(0)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in GPT2.tensors({**_CONFIG, **sizes}, GPT2.classes[0]).items():
        size = itemsize(dtype) * prod(tensor.shape)
        place = [len(data), len(data) + size]
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": place}
        data += bytes(rng.randrange(2) for _ in range(size)) if dtype == "BOOL" else rng.randbytes(size)
    raw = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return directory


def _data(directory: Path) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes by name."""
    content = (directory / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    del header["__metadata__"]
    places = {name: [start + offset for offset in entry["data_offsets"]] for name, entry in header.items()}
    return {name: (header[name]["dtype"], content[first:last]) for name, (first, last) in places.items()}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_is_kept_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    """Catches a dtype that is changed, or that only other formats can hold, where nothing is to be computed."""
    source = _hub(tmp_path / "source", dtype)
    convert(source, tmp_path / "tp", to="tp", tp_size=2)
    convert(tmp_path / "tp", tmp_path / "tp4", to="tp", tp_size=4)
    convert(tmp_path / "tp4", tmp_path / "hub", to="hub")
    assert _data(tmp_path / "hub") == _data(source)
    assert {found for found, _ in _data(source).values()} == {dtype}
    if dtype not in ("F64", "F32", "F16", "BF16"):
        convert(source, tmp_path / "cast", to="hub", dtype="bfloat16")
        assert _data(tmp_path / "cast") == _data(source)
        with pytest.raises(
            UnsupportedError, match=rf"tensors of other types than F64, .*transformer\.wte\.weight \({dtype}\)"
        ):
            convert(source, tmp_path / "megatron", to="megatron-lm", tp_size=2)
        assert not (tmp_path / "megatron").exists()


def test_a_head_that_megatron_lm_lacks(tmp_path: Path) -> None:
    """Catches a KeyError of the table for a classifier."""
    source = save_stock(tmp_path / "source", model_class=BertForSequenceClassification)
    with pytest.raises(UnsupportedError, match="a BertForSequenceClassification"):
        convert(source, tmp_path / "out", to="megatron-lm", tp_size=2)


_NUMERICS = [
    ("activation_function", "gelu_neo"),
    ("activation_function", None),
    ("layer_norm_epsilon", -1.0),
    ("layer_norm_epsilon", 0),
    ("layer_norm_epsilon", "1e-5"),
    ("layer_norm_epsilon", float("nan")),
    ("attn_pdrop", 7),
    ("attn_pdrop", 1.0),
    ("resid_pdrop", -0.1),
    ("embd_pdrop", [[0.1]]),
    ("embd_pdrop", True),
    ("initializer_range", "small"),
    ("quantization_config", {"bits": 4}),
]


@pytest.mark.parametrize(("name", "value"), _NUMERICS)
def test_a_configuration_that_does_not_run(tmp_path: Path, name: str, value: Any) -> None:
    """Catches a checkpoint that converts and that the stock library cannot run, and two commands that disagree."""
    source = _hub(tmp_path / "source", **{name: value})
    said = []
    for call in (lambda: inspect(source), lambda: convert(source, tmp_path / "out", to="tp", tp_size=2)):
        with pytest.raises(UnsupportedError, match=rf"not that of a model that runs: {name}") as caught:
            call()
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(("name", "value"), [("resid_pdrop", None), ("attn_pdrop", 0), ("activation_function", "mish")])
def test_a_configuration_that_is_unusual(tmp_path: Path, name: str, value: Any) -> None:
    """Catches a model refused for what does not matter to it."""
    source = _hub(tmp_path / "source", **{name: value})
    inspect(source)
    convert(source, tmp_path / "out", to="tp", tp_size=2)


def test_activations_are_those_of_the_library() -> None:
    """Catches an activation that transformers has and the table does not know, or the reverse."""
    assert set(ACTIVATIONS) == set(ACT2FN)


def test_a_degree_that_leaves_a_rank_without_words(tmp_path: Path) -> None:
    """Catches an empty shard, and a refusal of the largest degree that fits."""
    source = _hub(tmp_path / "source", vocab_size=3)
    with pytest.raises(PartitionError, match=r"transformer\.wte\.weight has 3 entries .* Choose fewer\.$"):
        convert(source, tmp_path / "out", to="tp", tp_size=4)
    convert(source, tmp_path / "out", to="tp", tp_size=3)


_FILES = [
    "x" * 300 + ".safetensors",
    "a\0.safetensors",
    "../model.safetensors",
    ".safetensors/",
    "\ud800.safetensors",
    3,
]


@pytest.mark.parametrize("name", _FILES, ids=range(len(_FILES)))
def test_names_of_files_in_an_index(tmp_path: Path, name: object) -> None:
    """Catches names that the system refuses, or that lead out of the directory."""
    source = _hub(tmp_path / "source")
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match=r"is not the name of a weight file|is not UTF-8") as caught:
        inspect(source)
    assert len(str(caught.value)) < 1000


def _said(call: Callable[[], object]) -> str:
    """The error of ours that a call ends with, if it ends with one."""
    try:
        call()
    except HfMegatronError as error:
        return str(error)
    return ""


class _Odd:
    """What is pickled as a call of a Megatron-LM class."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return set, ([1, 2],)


_VALUES: list[Any] = [_Odd(), [1, [2]], {"a": 1}, "x" * 10**5, 2**63, -1, float("nan"), b"bytes", torch.float16, (1, 2)]


@pytest.mark.parametrize("value", _VALUES, ids=range(len(_VALUES)))
@pytest.mark.parametrize(
    "name",
    [
        *("num_attention_heads", "init_method_std", "hidden_dropout", "layernorm_epsilon", "padded_vocab_size"),
        *("num_layers", "tensor_model_parallel_size", "num_unique_layers", "make_vocab_size_divisible_by"),
    ],
)
def test_arguments_of_other_types(tmp_path: Path, name: str, value: Any) -> None:
    """Catches values of a pickle that reach config.json, arithmetic, or a message, whatever they are."""
    variant = Variant(tp=1, layers=1, extra_arguments=((name, value),))
    write(tmp_path / "source", variant, make_weights(variant))
    source, out = tmp_path / "source", tmp_path / "out"
    for call in (lambda: inspect(source), lambda: convert(source, out, to="hub"), lambda: inspect(out)):
        assert len(_said(call)) < 3000


_NAMES = [
    "layers.99999999999999999999.mlp.dense_h_to_4h.weight",
    "layers.\u0663.mlp.dense_h_to_4h.weight",
    "\x1b[2J",
    "y" * 999,
]


@pytest.mark.parametrize("name", _NAMES, ids=range(len(_NAMES)))
def test_names_of_tensors(tmp_path: Path, name: str) -> None:
    """Catches a layer number that is counted up to, digits of other scripts, and names that change the terminal."""
    variant = Variant(tp=1, layers=1)
    write(tmp_path / "source", variant, make_weights(variant))
    path = next((tmp_path / "source").rglob("*.pt"))
    content = torch.load(path, weights_only=False)
    content["model"]["language_model"]["encoder"][name] = torch.zeros(2)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="1 stored names are not known") as caught:
        inspect(tmp_path / "source")
    assert str(caught.value).replace("\n", "").isprintable()


def test_numbers_of_ranks(tmp_path: Path) -> None:
    """Catches directories whose numbers are enumerated, however large."""
    variant = Variant(tp=1, layers=1, has_arguments=False)
    write(tmp_path / "source", variant, make_weights(variant))
    rank = next((tmp_path / "source").rglob("mp_rank_00"))
    rank.rename(rank.with_name("mp_rank_99999_999"))
    with pytest.raises(CheckpointError, match=re.escape("ranks and stages are more than 10,000, which is the limit")):
        inspect(tmp_path / "source")
    rank.with_name("mp_rank_99999_999").rename(rank.with_name("mp_rank_" + "9" * 200))
    with pytest.raises(CheckpointError, match="holds no mp_rank_XX"):
        inspect(tmp_path / "source")


@pytest.mark.parametrize("value", [1.5, {"a": 1}, [], [[1]], [None]])
def test_classes_of_other_types(tmp_path: Path, value: object) -> None:
    """Catches what is no list of classes, looked into as if it were."""
    variant = Variant(tp=1, layers=1)
    write(tmp_path / "source", variant, make_weights(variant))
    config = {"model_type": "gpt2", "architectures": value}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    inspect(tmp_path / "source")
    source = _hub(tmp_path / "hub", architectures=value)
    if value in ([], [None]):
        inspect(source)
    else:
        with pytest.raises(UnsupportedError, match=r"is no list of class names|is not one of the gpt2 classes"):
            inspect(source)


@pytest.mark.timeout(60)
def test_a_large_tracker(tmp_path: Path) -> None:
    """Catches a file of gigabytes that is read to find a number."""
    variant = Variant(tp=1, layers=1)
    write(tmp_path / "source", variant, make_weights(variant))
    tracker = tmp_path / "source" / "latest_checkpointed_iteration.txt"
    os.truncate(tracker, 2**36)
    with pytest.raises(CheckpointError, match=r"where an iteration or 'release' is expected"):
        inspect(tmp_path / "source")


@pytest.mark.timeout(60)
def test_a_tracker_that_is_no_file(tmp_path: Path) -> None:
    """Catches a pipe that is waited for."""
    variant = Variant(tp=1, layers=1)
    write(tmp_path / "source", variant, make_weights(variant))
    tracker = tmp_path / "source" / "latest_checkpointed_iteration.txt"
    tracker.unlink(missing_ok=True)
    os.mkfifo(tracker)
    inspect(tmp_path / "source")


def test_two_names_for_one_size(tmp_path: Path) -> None:
    """Catches a size read under one of its names where stock transformers goes by the other."""
    aliases: dict[str, Any] = {"num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 2}
    for name, value in aliases.items():
        with pytest.raises(UnsupportedError, match=rf"has both n_\w+=\d and {name}={value}"):
            convert(_hub(tmp_path / name, **{name: value}), tmp_path / "out", to="tp", tp_size=2)
    with pytest.raises(UnsupportedError, match=r"transformers_weights='other\.safetensors'"):
        convert(_hub(tmp_path / "w", transformers_weights="other.safetensors"), tmp_path / "out", to="tp", tp_size=2)
    assert not (tmp_path / "out").exists()
    convert(_hub(tmp_path / "same", num_attention_heads=4), tmp_path / "out", to="tp", tp_size=2)


@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("metadata", [{}, {"metadata": 5}, {"metadata": {}}])
def test_an_index_that_stock_could_not_load(tmp_path: Path, index: str, metadata: dict[str, Any]) -> None:
    """Catches weights that are taken over with an index that stock transformers fails on, or with none."""
    source = _hub(tmp_path / "source")
    (source / "model.safetensors").rename(source / "weights.safetensors")
    names = GPT2.tensors({**_CONFIG}, GPT2.classes[0])
    weight_map = dict.fromkeys(names, "weights.safetensors")
    (source / index).write_text(json.dumps({**metadata, "weight_map": weight_map}))
    convert(source, tmp_path / "out", to="hub")
    GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    is_kept = index.startswith("model") and metadata == {"metadata": {}}
    assert (tmp_path / "out" / ("weights.safetensors" if is_kept else "model.safetensors")).is_file()


def test_destinations_and_sizes_that_cannot_be(tied: Path, tmp_path: Path) -> None:
    """Catches errors of pathlib, of float and of a codec."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for destination, message in ((Path("/"), "whole file system"), (loop, "leads back to itself")):
        with pytest.raises(DestinationError, match=message):
            convert(tied, destination, to="hub", overwrite=True)
    with pytest.raises(UnsupportedError, match="not a size"):
        convert(tied, tmp_path / "out", to="hub", max_memory="9" * 400)
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/source-\xff"))
    shutil.copytree(tied, name)
    convert(name, tmp_path / "out", to="hub")
    assert "source-\ufffd" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["vocab.json", "vocab.txt"])
def test_vocabularies_beyond_any_tokenizer(tied: Path, tmp_path: Path, name: str) -> None:
    """Catches gigabytes for a vocabulary that is below the limit of its file's bytes."""
    convert(tied, tmp_path / "m", to="megatron-lm", tp_size=2)
    (tmp_path / "m/config.json").unlink()
    count = 4_000_001
    text = "{" + '"":0,' * count + '"":0}' if name == "vocab.json" else "".join(f"{n:x}\n" for n in range(count))
    (tmp_path / "m" / name).write_text(text)
    with pytest.raises(CheckpointError, match="4,000,000"):
        convert(tmp_path / "m", tmp_path / "out", to="hub")
