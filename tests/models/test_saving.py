"""Saving: what stock transformers loads, what any other layout loads, and what conversion makes of either."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hf_megatron.checkpoint.write_lock import lock_directory
from hf_megatron.errors import DestinationError, UnsupportedError
from tests.live import on_live_ranks
from tests.models.architectures import ARCHITECTURES, GPT2, POST, PRE, ModelCase, StockDir
from tests.models.reference import Pool, Tensors, assert_all_equal, full_weights, rank, run_at
from tests.tiers import cases


def _save(case: ModelCase, source: Path, directory: Path, tp_size: int, fsdp_size: int = 1, **options: Any) -> None:
    case.load(source, tp_size, options.pop("head", None), fsdp_size=fsdp_size).save_pretrained(directory, **options)
    assert (directory / "config.json").is_file(), "a rank went on before the directory was complete"


def _stored(directory: Path) -> Tensors:
    """Everything in the safetensors files of a directory; no name may be stored twice."""
    weights: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        content = load_file(path)
        assert not weights.keys() & content.keys()
        weights.update(content)
    return weights


_SAVED = [
    *((case, head, "base", 2) for case in ARCHITECTURES for head in case.heads),
    *((case, case.language_model, "untied", 2) for case in ARCHITECTURES),
    *((case, case.heads[0], *at) for case in ARCHITECTURES for at in (("base", 1), ("untied", 1), ("untied", 4))),
]


@cases(
    "case, head, variant, tp_size", _SAVED, [saved for saved in _SAVED if saved[0] is not PRE or saved[2] == "untied"]
)
def test_stock_loads_what_is_saved(
    pool: Pool, stock_dir: StockDir, tmp_path: Path, case: ModelCase, head: str, variant: str, tp_size: int
) -> None:
    """Catches a second copy of what is tied, a name of ours, and parts gathered in the wrong order."""
    stock = stock_dir(case, head, variant)
    run_at(pool, tp_size, _save, case, stock, tmp_path, tp_size, head=head)
    original = load_file(stock / "model.safetensors")
    assert_all_equal(_stored(tmp_path), original)
    model, info = case.stock(head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_all_equal(full_weights(model), full_weights(case.stock(head).from_pretrained(stock)))


@pytest.mark.parametrize(("case", "head"), [(case, head) for case in ARCHITECTURES for head in case.heads[:2]])
def test_config_says_what_is_asked(pool: Pool, stock_dir: StockDir, tmp_path: Path, case: ModelCase, head: str) -> None:
    """Catches a layout, or anything else of ours, that leaks into a stock config.json; and a placement that is lost."""
    stock = stock_dir(case, head)
    original = json.loads((stock / "config.json").read_text())
    changes = {
        "model_type": case.table.model_type,
        "architectures": [case.ours(head).__name__],
        **case.table.own_config,
    }
    for options, expected in (({}, {**original, **changes}), ({"stock": True}, original)):
        run_at(pool, 2, _save, case, stock, tmp_path, 2, head=head, **options)
        saved = json.loads((tmp_path / "config.json").read_text())
        # Of the entries that one of the stock configurations does not know, None is written.
        given, wanted = ({n: v for n, v in config.items() if v is not None} for config in (saved, expected))
        assert given == wanted
        names = {path.name for path in tmp_path.iterdir()} - {"generation_config.json"}
        assert names == {"config.json", "model.safetensors"}


def test_saving_in_several_files(pool: Pool, stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches an index that does not match its files, and ranks that write different ones."""
    run_at(pool, 2, _save, GPT2, stock_dir(), tmp_path, 2, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_all_equal(_stored(tmp_path), load_file(stock_dir() / "model.safetensors"))
    assert_all_equal(full_weights(GPT2.load(tmp_path)), full_weights(GPT2.load(stock_dir())))


def _load_weights(case: ModelCase, directory: Path, tp_size: int, fsdp_size: int = 1) -> Tensors:
    split = {"tp_size": tp_size, "fsdp_size": fsdp_size} if tp_size * fsdp_size > 1 else None
    model = case.auto(case.heads[0]).from_pretrained(directory, distributed_config=split)
    assert type(model).__name__.endswith(case.ours().__name__)  # FSDP puts its name in front
    return full_weights(model)


@cases(
    "case, variant, saved_at",
    itertools.product(ARCHITECTURES, ("base", "untied", "shared_heads"), ((1, 1), (2, 1), (3, 1), (4, 1), (2, 2))),
    [(GPT2, "shared_heads", (3, 1)), (GPT2, "untied", (2, 2)), (POST, "untied", (2, 2))],
)
def test_a_tp_directory_loads_at_any_layout(
    pool: Pool, stock_dir: StockDir, tmp_path: Path, case: ModelCase, variant: str, saved_at: tuple[int, int]
) -> None:
    """Catches boxes put together in the wrong order or along one dimension only, also in one plain process."""
    stock = stock_dir(case, None, variant)
    job = (case, stock, tmp_path / "tp", *saved_at)
    run_at(pool, saved_at[0] * saved_at[1], _save, *job, distributed_checkpoint=True)
    expected = load_file(stock / "model.safetensors")
    for load_at in ((1, 1), (2, 1), (4, 1), (2, 2)):
        for weights in run_at(pool, load_at[0] * load_at[1], _load_weights, case, tmp_path / "tp", *load_at):
            assert_all_equal(weights, expected)


def test_a_distributed_save_replaces_the_old_one_whole(pool: Pool, stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches stale shards among the new ones, and a tokenizer or an optimizer lost with the old weights."""
    directory = tmp_path / "checkpoint"
    run_at(pool, 4, _save, GPT2, stock_dir(GPT2, None, "untied"), directory, 4, distributed_checkpoint=True)
    kept = {"tokenizer.json", "training_args.bin", "optimizer.bin", "adapter_model.safetensors"}
    for name in (*kept, "model.safetensors", "model.safetensors.index.json", "pytorch_model-00001-of-00002.bin"):
        (directory / name).write_text("old")
    (directory / "state").mkdir()
    (directory / "state" / "file").write_text("old")
    lock = lock_directory(tmp_path / ".checkpoint.incomplete")  # of a save that was killed
    (lock.directory / "checkpoint").mkdir()
    (lock.directory / "checkpoint/shard-00009-model-00001-of-00001.safetensors").write_text("stale")
    lock.release()
    run_at(pool, 2, _save, GPT2, stock_dir(), directory, 2, distributed_checkpoint=True)
    shards = {f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)}
    names = {path.name for path in directory.iterdir()}
    assert names == {*shards, *kept, "config.json", "generation_config.json", "state"}
    assert all((directory / name).read_text() == "old" for name in (*kept, "state/file"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    (directory / "adapter_model.safetensors").unlink()
    assert_all_equal(_load_weights(GPT2, directory, 1), full_weights(GPT2.load(stock_dir())))
    run_at(pool, 2, _save, GPT2, stock_dir(GPT2, None, "untied"), directory, 2)  # a plain save takes the shards away
    assert_all_equal(_stored(directory), load_file(stock_dir(GPT2, None, "untied") / "model.safetensors"))


@on_live_ranks(2, timeout=30)
def test_a_whole_model_may_be_saved_by_one_rank_alone(stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches a barrier that waits for ranks that never come, as under DDP."""
    model = GPT2.load(stock_dir())
    if rank() == 0:
        model.save_pretrained(tmp_path / "saved")
    dist.barrier()
    assert (tmp_path / "saved" / "model.safetensors").is_file()


@on_live_ranks(2)
def test_arguments_of_stock_are_honoured(stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches `is_main_process` and `state_dict` lost on the way to the stock method."""
    model = GPT2.load(stock_dir(), 2)
    model.save_pretrained(tmp_path / "first", is_main_process=rank() == 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(tmp_path / "second", state_dict=model.state_dict())
    original = load_file(stock_dir() / "model.safetensors")
    assert_all_equal(_stored(tmp_path / "first"), original)
    assert_all_equal(_stored(tmp_path / "second"), {name: 2 * value for name, value in original.items()})


def test_refused_distributed_saves(stock_dir: StockDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a directory that claims to be stock and is not, and a working directory that is deleted under us."""
    model = GPT2.load(stock_dir())
    with pytest.raises(UnsupportedError, match="stock=True with distributed_checkpoint=True"):
        model.save_pretrained(tmp_path / "saved", stock=True, distributed_checkpoint=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DestinationError, match="a directory of its own"):
        model.save_pretrained(".", distributed_checkpoint=True)
    assert list(tmp_path.iterdir()) == []
