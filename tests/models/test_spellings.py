"""Stock directories as they are found: the many names and files of one and the same model."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from hf_megatron import MegatronGPT2LMHeadModel, MegatronGPT2Model
from hf_megatron.errors import CheckpointFormatError
from tests.models.reference import Pool, assert_all_equal, full_weights, layout, run_at

StockDir = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def _write(directory: Path, tensors: Tensors) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _without_prefix(directory: Path, tensors: Tensors) -> None:
    _write(directory, {name.removeprefix("transformer."): value for name, value in tensors.items()})


def _obsolete_buffers(directory: Path, tensors: Tensors) -> None:
    mask = torch.ones(32, 32).tril().bool()[None, None]
    buffers = {
        f"transformer.h.{i}.attn.{name}": value.clone()
        for i in range(2)
        for name, value in (("bias", mask), ("masked_bias", torch.tensor(-1e4)))
    }
    _write(directory, {**tensors, **buffers})


def _gamma_and_beta(directory: Path, tensors: Tensors) -> None:
    def old(name: str) -> str:
        is_norm = ".ln_" in name
        return name.replace(".weight", ".gamma").replace(".bias", ".beta") if is_norm else name

    _write(directory, {old(name): value for name, value in tensors.items()})


def _copy_of_the_head(directory: Path, tensors: Tensors) -> None:
    _write(directory, {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()})


def _head_instead_of_the_embedding(directory: Path, tensors: Tensors) -> None:
    renamed = {name: value for name, value in tensors.items() if name != "transformer.wte.weight"}
    _write(directory, {**renamed, "lm_head.weight": tensors["transformer.wte.weight"]})


def _in_files(directory: Path, tensors: Tensors, stem: str, suffix: str) -> None:
    weight_map = {}
    for i in range(3):
        part = {name: tensors[name] for name in list(tensors)[i::3]}
        file = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
        weight_map.update(dict.fromkeys(part, file))
        if suffix == "bin":
            torch.save(part, directory / file)
        else:
            save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _safetensors_files(directory: Path, tensors: Tensors) -> None:
    _in_files(directory, tensors, "model", "safetensors")


def _pickle(directory: Path, tensors: Tensors) -> None:
    torch.save(tensors, directory / "pytorch_model.bin")


def _pickle_of_an_old_torch(directory: Path, tensors: Tensors) -> None:
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _pickle_with_a_shared_head(directory: Path, tensors: Tensors) -> None:
    torch.save({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}, directory / "pytorch_model.bin")


def _pickles(directory: Path, tensors: Tensors) -> None:
    _in_files(directory, tensors, "pytorch_model", "bin")


def _everything_at_once(directory: Path, tensors: Tensors) -> None:
    old = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    old = {name.replace("ln_f.weight", "ln_f.gamma"): value for name, value in old.items()}
    old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    _pickle(directory, {**old, "lm_head.weight": tensors["transformer.wte.weight"].clone()})


SPELLINGS: dict[str, Callable[[Path, Tensors], None]] = {
    spelling.__name__[1:]: spelling
    for spelling in (
        _without_prefix,
        _obsolete_buffers,
        _gamma_and_beta,
        _copy_of_the_head,
        _head_instead_of_the_embedding,
        _safetensors_files,
        _pickle,
        _pickle_of_an_old_torch,
        _pickle_with_a_shared_head,
        _pickles,
        _everything_at_once,
    )
}


def _spell(stock: Path, directory: Path, spelling: Callable[[Path, Tensors], None]) -> None:
    directory.mkdir(exist_ok=True)
    shutil.copy(stock / "config.json", directory)
    spelling(directory, load_file(stock / "model.safetensors"))


def _load(directories: list[Path], tp_size: int) -> list[Tensors]:
    loaded = []
    for directory in directories:
        model, info = MegatronGPT2LMHeadModel.from_pretrained(
            directory, distributed_config=layout(tp_size), output_loading_info=True
        )
        assert not any(info.values()), f"{directory.name}: {info}"
        loaded.append(full_weights(model))
    return loaded


@pytest.mark.parametrize("tp_size", [1, 2])
def test_spellings_load(pool: Pool, stock_dir: StockDir, tmp_path: Path, tp_size: int) -> None:
    """Catches parameters that are drawn at random because their names in the file are others."""
    for name, spelling in SPELLINGS.items():
        _spell(stock_dir("base"), tmp_path / name, spelling)
    directories = [tmp_path / name for name in SPELLINGS]
    expected = full_weights(MegatronGPT2LMHeadModel.from_pretrained(stock_dir("base")))
    for loaded in run_at(pool, tp_size, _load, directories, tp_size):
        for directory, weights in zip(directories, loaded, strict=True):
            try:
                assert_all_equal(weights, expected)
            except AssertionError as error:
                raise AssertionError(f"{directory.name}: {error}") from error


def test_what_is_dropped_is_named(stock_dir: StockDir, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches tensors that vanish without a word."""
    _spell(stock_dir("base"), tmp_path, _obsolete_buffers)
    transformers_logging.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        MegatronGPT2LMHeadModel.from_pretrained(tmp_path)
    dropped = [message for message in caplog.messages if "dropped" in message]
    assert len(dropped) == 1
    for i in range(2):
        assert f"transformer.h.{i}.attn.bias" in dropped[0]
        assert f"transformer.h.{i}.attn.masked_bias" in dropped[0]


@pytest.mark.parametrize("name", ["base", "without_prefix"])
def test_the_base_model_loads_from_any_head(stock_dir: StockDir, tmp_path: Path, name: str) -> None:
    """Catches the base model's parameters looked for under the prefix they have in a model with a head."""
    stock = stock_dir("base")
    _spell(stock, tmp_path, _without_prefix if name == "without_prefix" else _write)
    model, info = MegatronGPT2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    expected = full_weights(MegatronGPT2LMHeadModel.from_pretrained(stock))
    assert_all_equal({f"transformer.{name}": value for name, value in full_weights(model).items()}, expected)


def _refusal(directory: Path, tp_size: int) -> str:
    with pytest.raises(CheckpointFormatError) as caught:
        MegatronGPT2LMHeadModel.from_pretrained(directory, distributed_config=layout(tp_size))
    return str(caught.value)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_another_head_than_the_tied_one_is_refused(
    pool: Pool, stock_dir: StockDir, tmp_path: Path, tp_size: int
) -> None:
    """Catches a trained head thrown away because the config says it is the embedding; one bit is enough."""

    def spelling(directory: Path, tensors: Tensors) -> None:
        head = tensors["transformer.wte.weight"].clone()
        head[130, 47] += 1e-6
        _write(directory, {**tensors, "lm_head.weight": head})

    _spell(stock_dir("base"), tmp_path, spelling)
    for message in run_at(pool, tp_size, _refusal, tmp_path, tp_size):
        assert "lm_head.weight" in message
        assert '"tie_word_embeddings": false' in message


class _RunsOnLoading:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


def test_a_pickle_with_code_is_refused(stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches a checkpoint that runs what it likes when it is opened."""

    def spelling(directory: Path, tensors: Tensors) -> None:
        torch.save({**tensors, "extra": _RunsOnLoading()}, directory / "pytorch_model.bin")

    _spell(stock_dir("base"), tmp_path, spelling)
    assert "system" in _refusal(tmp_path, 1)
