"""What the models do not do, they refuse: before any weight is read, with the numbers and the way out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig
from transformers.distributed import DistributedConfig

from hf_megatron.errors import (
    CheckpointFormatError,
    CheckpointIncompleteError,
    CheckpointShapeError,
    ParallelStateError,
    PartitionError,
    UnsupportedError,
)
from tests.models.architectures import ARCHITECTURES, GPT2, ModelCase, StockDir
from tests.models.reference import Pool, layout, run_at

Result = tuple[str, str]  # name of the exception's class and its text


def _load(directory: Path, distributed_config: DistributedConfig | None, case: ModelCase = GPT2) -> Result:
    return _attempt(lambda: case.ours().from_pretrained(directory, distributed_config=distributed_config))


def _build(config: Any, distributed_config: DistributedConfig | None, case: ModelCase = GPT2) -> Result:
    return _attempt(lambda: case.ours().from_config(config, distributed_config=distributed_config))


def _attempt(make: Callable[[], Any]) -> Result:
    try:
        make()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "it was done"


def _assert_refused(results: list[Result], error: type[Exception], *phrases: str) -> None:
    for name, text in results:
        assert name == error.__name__, text
        assert [phrase for phrase in phrases if phrase not in text] == [], text


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_heads_that_do_not_divide(pool: Pool, tmp_path: Path, case: ModelCase) -> None:
    """Catches heads cut in two, and a refusal that comes after gigabytes were read: the weights are no file at all."""
    sizes: dict[str, Any] = {"num_attention_heads": 15, "hidden_size": 60}
    case.save_stock(tmp_path, **sizes)
    (tmp_path / "model.safetensors").write_text("not a weight file")
    phrases = ("num_attention_heads=15 is not divisible by tp_size=2; choose 1, 3",)
    _assert_refused(run_at(pool, 2, _load, tmp_path, layout(2), case), PartitionError, *phrases)
    _assert_refused(run_at(pool, 2, _build, case.config(**sizes), layout(2), case), PartitionError, *phrases)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_vocabulary_that_leaves_a_rank_without_rows(pool: Pool, case: ModelCase) -> None:
    """Catches an empty shard: cut as torch.chunk cuts them, 5 rows over 4 ranks are 2, 2, 1 and 0."""
    results = run_at(pool, 4, _build, case.config(vocab_size=5), layout(4), case)
    _assert_refused(results, PartitionError, case.table.word_embedding, "5", "tp_size=4")


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "needed"),
    [
        (1, {"tp_size": 2}, 2),
        (2, {"tp_size": 4}, 4),
        (2, {"fsdp_size": 4}, 4),
        (4, {"tp_size": 2}, 2),
        (4, {"tp_size": 2, "dp_replicate_size": 4}, 8),
    ],
)
def test_a_world_of_another_size(
    pool: Pool, stock_dir: StockDir, num_ranks: int, sizes: dict[str, int], needed: int
) -> None:
    """Catches a mesh that leaves ranks over, which would wait for the others forever."""
    results = run_at(pool, num_ranks, _load, stock_dir(), DistributedConfig(**sizes))
    there_are = f"there are {num_ranks}"
    _assert_refused(results, ParallelStateError, f"needs {needed} processes", there_are, f"--nproc-per-node {needed}")


@pytest.mark.parametrize(
    ("options", "phrase"), [({"pp_size": 2}, "pp_size=2"), ({"tp_size": 2, "tp_plan": {"a": "colwise"}}, "tp_plan")]
)
def test_layouts_these_models_do_not_have(stock_dir: StockDir, options: dict[str, Any], phrase: str) -> None:
    """Catches an option that is accepted and does nothing."""
    _assert_refused([_load(stock_dir(), DistributedConfig(**options))], UnsupportedError, phrase)


def test_cross_attention(tmp_path: Path) -> None:
    """Catches a decoder that would ignore its encoder, also where the config is read from a file."""
    with pytest.raises(UnsupportedError, match=r"add_cross_attention=True"):
        GPT2.config(add_cross_attention=True)
    GPT2.save_stock(tmp_path, add_cross_attention=True)
    _assert_refused([_load(tmp_path, None)], UnsupportedError, "add_cross_attention=True")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("tp_size", [1, 2])
def test_tensors_of_another_shape(pool: Pool, stock_dir: StockDir, tmp_path: Path, tp_size: int) -> None:
    """Catches a rank whose slice of a wrong tensor happens to have the right shape: 131 and 132 rows, cut in two."""
    shutil.copytree(stock_dir(), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.wte.weight"] = torch.zeros(132, 48)
    tensors["transformer.h.1.mlp.c_fc.bias"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    phrases = (
        "transformer.wte.weight is [132, 48], expected [131, 48]",
        "transformer.h.1.mlp.c_fc.bias is [7], expected [192]",
        "ignore_mismatched_sizes=True",
    )
    _assert_refused(run_at(pool, tp_size, _load, tmp_path, layout(tp_size)), CheckpointShapeError, *phrases)


def _shard(index: int) -> str:
    return f"shard-{index:05d}-model-00001-of-00001.safetensors"


@pytest.mark.parametrize("tp_size", [1, 2])
def test_files_that_do_not_make_up_one_model(pool: Pool, stock_dir: StockDir, tmp_path: Path, tp_size: int) -> None:
    """Catches what stock loads without a word: tensors cut short or left as memory was, and two saves put together."""
    two, four, both = (tmp_path / name for name in ("2", "4", "both"))
    for degree, directory in ((4, four), (2, two)):
        pool(degree).run(GPT2.save_distributed, stock_dir(), directory, degree)
        shutil.copytree(directory, both, dirs_exist_ok=True)
    shutil.copy(stock_dir() / "model.safetensors", two)
    (four / _shard(3)).unlink()
    for directory, error, phrases in (
        (two, CheckpointFormatError, ("model.safetensors", _shard(1))),
        (both, CheckpointIncompleteError, (GPT2.embedding, "overlap")),
        (four, CheckpointIncompleteError, ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight")),
    ):
        _assert_refused(run_at(pool, tp_size, _load, directory, layout(tp_size)), error, *phrases)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_quantization(stock_dir: StockDir, case: ModelCase) -> None:
    """Catches a model that is left whole without a word, as transformers finds no nn.Linear in it to replace."""
    for given in ({"quant_method": "fp8"}, BitsAndBytesConfig(load_in_8bit=True)):
        with pytest.raises(UnsupportedError, match=r"quantization_config: .* stock=True"):
            case.load(stock_dir(case), quantization_config=given)
    config = case.config(quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedError, match="quantization_config: "):
        case.ours()(config)
