"""What the models do not do, they refuse: before any weight is read, with the numbers and the way out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GPT2LMHeadModel
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.errors import (
    CheckpointFormatError,
    CheckpointIncompleteError,
    CheckpointShapeError,
    ParallelStateError,
    PartitionError,
    UnsupportedError,
)
from tests.models.reference import (
    TINY,
    Pool,
    assert_all_equal,
    full_weights,
    layout,
    run_at,
    save_distributed,
    save_stock,
    token_ids,
)

StockDir = Callable[[str], Path]
Result = tuple[str, str]  # name of the exception's class and its text


def _load(directory: Path, distributed_config: DistributedConfig | None) -> Result:
    try:
        MegatronGPT2LMHeadModel.from_pretrained(directory, distributed_config=distributed_config)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "it was loaded"


def _build(config: MegatronGPT2Config, distributed_config: DistributedConfig | None) -> Result:
    try:
        MegatronGPT2LMHeadModel.from_config(config, distributed_config=distributed_config)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "it was built"


def _assert_refused(results: list[Result], error: type[Exception], *phrases: str) -> None:
    for name, text in results:
        assert name == error.__name__, text
        assert [phrase for phrase in phrases if phrase not in text] == [], text


def test_heads_that_do_not_divide(pool: Pool, tmp_path: Path) -> None:
    """Catches heads cut in two, and a refusal that comes after gigabytes were read: the weights are no file at all."""
    save_stock(tmp_path, n_head=25, n_embd=50)
    (tmp_path / "model.safetensors").write_text("not a weight file")
    phrases = ("num_attention_heads=25", "tp_size=2", "choose 1, 5 or 25")
    _assert_refused(run_at(pool, 2, _load, tmp_path, layout(2)), PartitionError, *phrases)
    config = MegatronGPT2Config(**{**TINY, "n_head": 25, "n_embd": 50})
    _assert_refused(run_at(pool, 2, _build, config, layout(2)), PartitionError, *phrases)


def test_a_vocabulary_that_leaves_a_rank_without_rows(pool: Pool) -> None:
    """Catches an empty shard: cut as torch.chunk cuts them, 5 rows over 4 ranks are 2, 2, 1 and 0."""
    config = MegatronGPT2Config(**{**TINY, "vocab_size": 5})
    _assert_refused(run_at(pool, 4, _build, config, layout(4)), PartitionError, "wte.weight", "5", "tp_size=4")


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
    results = run_at(pool, num_ranks, _load, stock_dir("base"), DistributedConfig(**sizes))
    there_are = f"there are {num_ranks}"
    _assert_refused(results, ParallelStateError, f"needs {needed} processes", there_are, f"--nproc-per-node {needed}")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"pp_size": 2}, "pp_size=2"),
        ({"tp_size": 2, "tp_plan": {"lm_head": "colwise"}}, "tp_plan"),
    ],
)
def test_layouts_these_models_do_not_have(stock_dir: StockDir, options: dict[str, Any], phrase: str) -> None:
    """Catches an option that is accepted and does nothing."""
    _assert_refused([_load(stock_dir("base"), DistributedConfig(**options))], UnsupportedError, phrase)


def test_cross_attention() -> None:
    """Catches a decoder that would ignore its encoder."""
    with pytest.raises(UnsupportedError, match=r"add_cross_attention=True"):
        MegatronGPT2Config(**{**TINY, "add_cross_attention": True})


def test_cross_attention_in_a_stock_directory(tmp_path: Path) -> None:
    """Catches the same where the config is read from a file."""
    save_stock(tmp_path, add_cross_attention=True)
    _assert_refused([_load(tmp_path, None)], UnsupportedError, "add_cross_attention=True")


def test_labels_outside_of_the_vocabulary(pool: Pool, stock_dir: StockDir) -> None:
    """Catches a target that lies in no rank's shard and counts as a loss of its own."""
    run_at(pool, 2, _expect_refused_ids, stock_dir("base"))


def _expect_refused_ids(directory: Path) -> None:
    model = MegatronGPT2LMHeadModel.from_pretrained(directory, distributed_config=layout(2)).train()
    ids = token_ids()
    with pytest.raises(PartitionError, match=r"target 131 .*vocab_size=131"):
        model(ids, labels=ids.clone().fill_(131))
    with pytest.raises(IndexError, match=r"131 rows"):
        model(ids.clone().fill_(131))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("tp_size", [1, 2])
def test_tensors_of_another_shape(pool: Pool, stock_dir: StockDir, tmp_path: Path, tp_size: int) -> None:
    """Catches a rank whose slice of a wrong tensor happens to have the right shape: 131 and 132 rows, cut in two."""
    shutil.copytree(stock_dir("base"), tmp_path, dirs_exist_ok=True)
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


def test_a_truncated_file(stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches a download that broke off."""
    shutil.copytree(stock_dir("base"), tmp_path, dirs_exist_ok=True)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    _assert_refused([_load(tmp_path, None)], CheckpointIncompleteError, "model.safetensors", "truncated")


@pytest.fixture(scope="module")
def tp_dir(pool: Pool, stock_dir: StockDir, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A function from a degree to a tp directory of it; not to be written to."""
    root = tmp_path_factory.mktemp("tp")
    for tp_size in (2, 4):
        pool(tp_size).run(save_distributed, stock_dir("base"), root / str(tp_size), tp_size)
    return lambda tp_size: root / str(tp_size)


def _shard(index: int) -> str:
    return f"shard-{index:05d}-model-00001-of-00001.safetensors"


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("lost", [1, 2, 3, 4])
def test_a_lost_shard(pool: Pool, tp_dir: Callable[[int], Path], tmp_path: Path, lost: int, tp_size: int) -> None:
    """Catches what stock loads without a word: every cut tensor shorter, or its last part left as memory was."""
    shutil.copytree(tp_dir(4), tmp_path, dirs_exist_ok=True)
    (tmp_path / _shard(lost)).unlink()
    results = run_at(pool, tp_size, _load, tmp_path, layout(tp_size))
    for name in ("wte.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight"):
        _assert_refused(results, CheckpointIncompleteError, f"transformer.{name}")


@pytest.mark.parametrize("tp_size", [1, 2])
def test_shards_of_another_degree(pool: Pool, tp_dir: Callable[[int], Path], tmp_path: Path, tp_size: int) -> None:
    """Catches two saves in one directory, which stock puts together to a model that was never trained."""
    shutil.copytree(tp_dir(4), tmp_path, dirs_exist_ok=True)
    shutil.copytree(tp_dir(2), tmp_path, dirs_exist_ok=True)
    results = run_at(pool, tp_size, _load, tmp_path, layout(tp_size))
    _assert_refused(results, CheckpointIncompleteError, "transformer.wte.weight", "overlap")


@pytest.mark.parametrize("tp_size", [1, 2])
def test_shards_beside_a_whole_model(
    pool: Pool, stock_dir: StockDir, tp_dir: Callable[[int], Path], tmp_path: Path, tp_size: int
) -> None:
    """Catches a directory with two models in it, of which one would be chosen silently."""
    shutil.copytree(tp_dir(2), tmp_path, dirs_exist_ok=True)
    shutil.copy(stock_dir("base") / "model.safetensors", tmp_path)
    results = run_at(pool, tp_size, _load, tmp_path, layout(tp_size))
    _assert_refused(results, CheckpointFormatError, "model.safetensors", _shard(1))


# ---------------------------------------------------------------- resizing the vocabulary


def _expect_refused_resizing(directory: Path) -> None:
    model = MegatronGPT2LMHeadModel.from_pretrained(directory, distributed_config=layout(dist.get_world_size()))
    before = full_weights(model)
    with pytest.raises(UnsupportedError, match=r"resize_token_embeddings .* 2 ranks. Load in one process"):
        model.resize_token_embeddings(140)
    assert model.config.vocab_size == 131
    assert_all_equal(full_weights(model), before)


def test_resizing_over_several_ranks(pool: Pool, stock_dir: StockDir) -> None:
    """Catches rows added to one rank's shard, which moves every token behind them."""
    pool(2).run(_expect_refused_resizing, stock_dir("base"))


@pytest.mark.parametrize("variant", ["base", "untied"])
@pytest.mark.parametrize("options", [{"new_num_tokens": 140}, {"new_num_tokens": 100}, {"pad_to_multiple_of": 64}])
def test_resizing_in_one_process(stock_dir: StockDir, tmp_path: Path, variant: str, options: dict[str, int]) -> None:
    """Catches a head that keeps the old size, or whose new rows are not those of stock."""
    resized = []
    for model_class in (GPT2LMHeadModel, MegatronGPT2LMHeadModel):
        model = model_class.from_pretrained(stock_dir(variant))
        torch.manual_seed(3)
        model.resize_token_embeddings(**options)
        resized.append(model)
    stock, ours = resized
    assert ours.config.vocab_size == stock.config.vocab_size
    assert_all_equal(full_weights(ours), full_weights(stock))
    ids = token_ids(vocab_size=99)
    torch.testing.assert_close(ours.eval()(ids).logits, stock.eval()(ids).logits)
    ours.train()(ids, labels=ids).loss.backward()

    ours.save_pretrained(tmp_path)
    again, info = MegatronGPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_all_equal(full_weights(again), full_weights(ours))


def test_resizing_without_the_mean(stock_dir: StockDir) -> None:
    """Catches new rows that are left as memory was."""
    model = MegatronGPT2LMHeadModel.from_pretrained(stock_dir("untied"))
    before = full_weights(model)
    model.resize_token_embeddings(500, mean_resizing=False)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weight = full_weights(model)[name]
        assert torch.equal(weight[:131], before[name])
        assert weight[131:].std().item() == pytest.approx(0.02, rel=0.1)


def test_quantization(stock_dir: StockDir) -> None:
    """Catches a model that is left whole without a word, as transformers finds no nn.Linear in it to replace."""
    for given in ({"quant_method": "fp8"}, BitsAndBytesConfig(load_in_8bit=True)):
        with pytest.raises(UnsupportedError, match=r"quantization_config: .* stock=True"):
            MegatronGPT2LMHeadModel.from_pretrained(stock_dir("base"), quantization_config=given)
    config = MegatronGPT2Config(**TINY, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedError, match="quantization_config: "):
        MegatronGPT2LMHeadModel(config)
