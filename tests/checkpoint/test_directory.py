from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_megatron.checkpoint import LazyTensor, open_checkpoint, open_files
from hf_megatron.errors import CheckpointError, CheckpointFormatError, CheckpointIncompleteError
from tests.checkpoint.directories import (
    CONFIG,
    SHARD_NAME,
    Tensors,
    model_tensors,
    write_config,
    write_hub,
    write_hub_files,
    write_pickle,
    write_shard,
)

WRITERS: dict[str, Callable[[Path, Tensors], Path]] = {
    "safetensors": write_hub,
    "safetensors-files": partial(write_hub_files, suffix="safetensors"),
    "bin": write_pickle,
    "legacy-bin": partial(write_pickle, is_zip=False),
    "bin-files": partial(write_hub_files, suffix="bin"),
}


def assert_same(stored: dict[str, LazyTensor], tensors: Tensors) -> None:
    assert set(stored) == set(tensors)
    for name, tensor in tensors.items():
        read = stored[name].read()
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name
        assert stored[name].shape == tuple(tensor.shape)
        assert torch.equal(stored[name][1:3], tensor[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_hub_directory_is_read(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Catches a kind of weight file, or a dtype in it, that is not found or comes back changed."""
    tensors = model_tensors(dtype=dtype)
    checkpoint = open_checkpoint(WRITERS[kind](tmp_path, tensors))
    assert (checkpoint.format, checkpoint.tp_size, checkpoint.config) == ("hub", 1, CONFIG)
    assert_same(checkpoint.tensors, tensors)
    assert all(file.is_file() for file in checkpoint.files)


def test_safetensors_win_over_a_pickle(tmp_path: Path) -> None:
    """Catches the pickle being opened although safer weights lie beside it, as in most older Hub repositories."""
    tensors = model_tensors()
    write_hub(tmp_path, tensors)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert_same(open_checkpoint(tmp_path).tensors, tensors)


@pytest.mark.parametrize(
    ("config", "told"),
    [(None, r"no config\.json"), ("{}", "holds no weights"), ("{", "not valid JSON"), ("[]", "list where an object")],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, config: str | None, told: str) -> None:
    """Catches a traceback of ours where the user gave a wrong path."""
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointFormatError, match=told):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointFormatError, match="is not a directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointFormatError, match="neither"):
        open_files([tmp_path / "model.gguf"])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_that_names_missing_files_is_refused(tmp_path: Path, suffix: str) -> None:
    """Catches a report of the first missing file only, or of a FileNotFoundError without the index's name."""
    write_hub_files(tmp_path, model_tensors(), suffix)
    for file in tmp_path.glob("*-0000[13]-of-*"):
        file.unlink()
    with pytest.raises(CheckpointIncompleteError, match=r"index\.json.*2 are missing.*-00001-of-.*-00003-of-"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_a_tensor_its_file_lacks_is_refused(tmp_path: Path) -> None:
    """Catches an index and files from different saves."""
    index = write_hub_files(tmp_path, model_tensors(), "safetensors") / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["invented.weight"] = "model-00001-of-00003.safetensors"
    content["weight_map"]["transformer.wte.weight"] = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointIncompleteError, match=r"do not hold: transformer\.wte.*invented\.weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        # Files elsewhere on the machine, to which a downloaded index must not lead.
        *(
            ({"weight_map": {"x": name}}, "not the name of a weight file")
            for name in ("../secret.safetensors", "/etc/secret.safetensors", "..", "", 5)
        ),
        # An empty model.
        ({}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": ["x"]}, "no weight_map"),
    ],
)
def test_an_index_that_names_no_files_of_its_own_is_refused(tmp_path: Path, index: object, told: str) -> None:
    """Catches files opened outside of the directory, and an empty model where the index is damaged."""
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointFormatError, match=told):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    """Catches the order of the files deciding which of two values a tensor gets."""
    for name in ("a", "b"):
        save_file({"x": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointFormatError, match=r"x is stored in both .*a\.safetensors and .*b\.safetensors"):
        open_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_one_rank_s_shard_is_not_a_model(tmp_path: Path) -> None:
    """Catches a lone shard opened as if its part of each tensor were the tensor."""
    write_shard(tmp_path / SHARD_NAME.format(1), {"x": torch.zeros(2)}, {"x": [2]})
    with pytest.raises(CheckpointFormatError, match="one rank's part"):
        open_files([tmp_path / SHARD_NAME.format(1)])


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_an_unsafe_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_zip: bool) -> None:
    """Catches code run by a downloaded file, also where torch is told not to check, and advice to tell it so."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "ran"
    malicious = type("Runs", (), {"__reduce__": lambda self: (os.system, (f"touch {marker}",))})()
    write_pickle(tmp_path, {"x": malicious}, is_zip)
    with pytest.raises(CheckpointFormatError, match=r"pickle asks for \w+\.system") as error:
        open_checkpoint(tmp_path)
    assert not marker.exists()
    assert "weights_only" not in str(error.value)
    assert error.value.__context__ is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({"model": {"x": torch.zeros(2)}}, "'model' is a dict"),
        ({"x": torch.zeros(2), "step": 3}, "'step' is a int"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
    ],
)
def test_a_pickle_of_anything_but_named_tensors_is_refused(tmp_path: Path, content: object, message: str) -> None:
    """Catches a training checkpoint taken for weights."""
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointFormatError, match=message):
        open_files([tmp_path / "pytorch_model.bin"])


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_truncated_pickle_is_refused(tmp_path: Path, is_zip: bool) -> None:
    """Catches the six kinds of errors that torch's readers raise, depending on where the file ends."""
    file = tmp_path / "pytorch_model.bin"
    torch.save(model_tensors(), file, _use_new_zipfile_serialization=is_zip)
    whole = file.read_bytes()
    for size in (*range(0, 400, 7), len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            open_files([file])


def test_a_file_of_another_kind_is_named_as_such(tmp_path: Path) -> None:
    """Catches a warning about malicious code for a clone without Git LFS, and a program taken for a truncated file."""
    file = tmp_path / "pytorch_model.bin"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointFormatError, match="Git LFS"):
        open_files([file])
    with zipfile.ZipFile(file, "w") as archive:  # torch.jit, which would write one, is deprecated
        for name, content in (("data.pkl", b"N."), ("constants.pkl", b"N."), ("version", b"3\n")):
            archive.writestr(f"program/{name}", content)
    with pytest.raises(CheckpointFormatError, match="TorchScript"):
        open_files([file])
