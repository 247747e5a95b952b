"""Stock directories as they are found: the many names and files of one and the same model."""

import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from hf_megatron.errors import CheckpointFormatError
from tests.live import on_live_ranks
from tests.models.architectures import ARCHITECTURES, GPT2, POST, PRE, ModelCase, StockDir
from tests.models.reference import Pool, Tensors, assert_all_equal, full_weights, rank, run_at
from tests.tiers import cases

Spelling = Callable[[ModelCase, Tensors], Tensors]

BUFFERS = {  # by the ends of their names
    "attn.bias": torch.ones(32, 32).tril().bool()[None, None],
    "attn.masked_bias": torch.tensor(-1e4),
    "embeddings.position_ids": torch.arange(32)[None],
    "embeddings.token_type_ids": torch.zeros(1, 32).long(),
}


def _write(tensors: Tensors, file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def _several(save: Callable[[Tensors, Path], None], tensors: Tensors, file: Path) -> None:
    """Three files and their index in place of one."""
    weight_map: dict[str, str] = {}
    for i in range(3):
        part = {name: tensors[name] for name in list(tensors)[i::3]}
        name = f"{file.stem}-{i + 1:05d}-of-00003{file.suffix}"
        weight_map |= dict.fromkeys(part, name)
        save(part, file.with_name(name))
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _without_prefix(case: ModelCase, tensors: Tensors) -> Tensors:
    return {name.removeprefix(f"{case.table.base_prefix}."): value for name, value in tensors.items()}


def _obsolete_buffers(case: ModelCase, tensors: Tensors) -> Tensors:
    """With what models had once; that of layers in each of the two."""
    buffers = {
        f"{case.table.base_prefix}.{pattern.replace('*', str(i))}": value.clone()
        for pattern in case.table.obsolete
        for i in range(2)
        for name, value in BUFFERS.items()
        if pattern.endswith(name)
    }
    return {**tensors, **buffers}


def _gamma_and_beta(case: ModelCase, tensors: Tensors) -> Tensors:
    norms = {name.removesuffix(".weight") for name, value in tensors.items() if value.dim() == 1 and ".weight" in name}

    def old(name: str) -> str:
        is_norm = name.rpartition(".")[0] in norms
        return name.replace(".weight", ".gamma").replace(".bias", ".beta") if is_norm else name

    return {old(name): value for name, value in tensors.items()}


def _copies_of_what_is_tied(case: ModelCase, tensors: Tensors) -> Tensors:
    return {**tensors, **{name: tensors[original].clone() for name, original in case.tied.items()}}


def _shared_copies_of_what_is_tied(case: ModelCase, tensors: Tensors) -> Tensors:
    return {**tensors, **{name: tensors[original] for name, original in case.tied.items()}}


def _copies_in_place_of_the_originals(case: ModelCase, tensors: Tensors) -> Tensors:
    kept = {name: value for name, value in tensors.items() if name not in case.tied.values()}
    return {**kept, **{name: tensors[original] for name, original in case.tied.items()}}


def _everything_at_once(case: ModelCase, tensors: Tensors) -> Tensors:
    for spelling in (_copies_of_what_is_tied, _obsolete_buffers, _gamma_and_beta, _without_prefix):
        tensors = spelling(case, tensors)
    return tensors


# What the names become, the file, and what writes it.
SPELLINGS: list[tuple[Spelling | None, str, Callable[[Tensors, Path], None]]] = [
    (_without_prefix, "model.safetensors", _write),
    (_obsolete_buffers, "model.safetensors", _write),
    (_gamma_and_beta, "model.safetensors", _write),
    (_copies_of_what_is_tied, "model.safetensors", _write),
    (_copies_in_place_of_the_originals, "model.safetensors", _write),
    (None, "model.safetensors", partial(_several, _write)),
    (None, "pytorch_model.bin", torch.save),
    (None, "pytorch_model.bin", partial(torch.save, _use_new_zipfile_serialization=False)),
    (_shared_copies_of_what_is_tied, "pytorch_model.bin", torch.save),
    (None, "pytorch_model.bin", partial(_several, torch.save)),
    (_everything_at_once, "pytorch_model.bin", torch.save),
]


def _spell(case: ModelCase, stock: Path, directory: Path, spelling: Spelling | None, file: str, write: Any) -> None:
    directory.mkdir(exist_ok=True)
    shutil.copy(stock / "config.json", directory)
    tensors = load_file(stock / "model.safetensors")
    write(tensors if spelling is None else spelling(case, tensors), directory / file)


def _load(case: ModelCase, directories: list[Path], tp_size: int, stock: Path) -> None:
    expected = load_file(stock / "model.safetensors")
    for directory in directories:
        model, info = case.load(directory, tp_size, output_loading_info=True)
        assert not any(info.values()), f"{directory.name}: {info}"
        try:
            assert_all_equal(full_weights(model), expected)
        except AssertionError as error:
            raise AssertionError(f"{directory.name}: {error}") from error


@cases("case, tp_size", itertools.product(ARCHITECTURES, (1, 2)), [(GPT2, 1), (GPT2, 2), (PRE, 1), (POST, 2)])
def test_spellings_load(pool: Pool, stock_dir: StockDir, tmp_path: Path, case: ModelCase, tp_size: int) -> None:
    """Catches parameters that are drawn at random because their names in the file are others."""
    directories = [tmp_path / f"{i}{getattr(spelling, '__name__', '')}" for i, (spelling, *_) in enumerate(SPELLINGS)]
    for directory, spelling in zip(directories, SPELLINGS, strict=True):
        _spell(case, stock_dir(case), directory, *spelling)
    run_at(pool, tp_size, _load, case, directories, tp_size, stock_dir(case))


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_dropped_names(stock_dir: StockDir, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: ModelCase) -> None:
    """Catches tensors that vanish without a word."""
    _spell(case, stock_dir(case), tmp_path, *SPELLINGS[1])
    transformers_logging.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        case.load(tmp_path)
    (dropped,) = [message for message in caplog.messages if "dropped" in message]
    names = load_file(tmp_path / "model.safetensors").keys() - load_file(stock_dir(case) / "model.safetensors").keys()
    assert len(names) == (4 if case is GPT2 else 2)
    assert [name for name in names if name not in dropped] == []


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(("case", "name"), [(case, name) for case in (GPT2, POST) for name in case.tied])
@on_live_ranks()
def test_another_head_than_the_tied_one_is_refused(
    stock_dir: StockDir, tmp_path: Path, case: ModelCase, name: str, tp_size: int
) -> None:
    """Catches a trained head, or its bias alone, thrown away because the config says it is tied; a bit is enough."""

    def spelling(case: ModelCase, tensors: Tensors) -> Tensors:
        tensors = _copies_of_what_is_tied(case, tensors)
        tensors[name].view(-1)[-1] += 1e-6
        return tensors

    directory = tmp_path / str(rank())
    _spell(case, stock_dir(case), directory, spelling, "model.safetensors", _write)
    with pytest.raises(CheckpointFormatError, match='"tie_word_embeddings": false') as caught:
        case.load(directory, tp_size)
    assert name in str(caught.value)


def test_a_pickle_with_code_is_refused(stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches weights that run what they like when a model is loaded from them."""
    run = type("Run", (), {"__reduce__": lambda self: (os.system, ("true",))})
    _spell(GPT2, stock_dir(), tmp_path, lambda _, tensors: {**tensors, "extra": run()}, "pytorch_model.bin", torch.save)
    with pytest.raises(CheckpointFormatError, match=r"os\.system"):
        GPT2.load(tmp_path)
