"""Saving: what stock transformers loads, what any other layout loads, and what is left in the directory."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import hf_megatron
from hf_megatron import MegatronGPT2LMHeadModel
from hf_megatron.errors import DestinationError, UnsupportedError
from tests.models.reference import (
    Pool,
    assert_all_equal,
    full_weights,
    layout,
    rank,
    run_at,
    save_distributed,
    save_stock,
    token_ids,
)
from tests.tiers import quick

StockDir = Callable[[str], Path]
Weights = dict[str, torch.Tensor]

HEADS = {
    "AutoModel": "GPT2Model",
    "AutoModelForCausalLM": "GPT2LMHeadModel",
    "AutoModelForSequenceClassification": "GPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "GPT2ForTokenClassification",
    "AutoModelForQuestionAnswering": "GPT2ForQuestionAnswering",
}


def _save(stock: Path, directory: Path, tp_size: int, options: dict[str, Any]) -> None:
    model = MegatronGPT2LMHeadModel.from_pretrained(stock, distributed_config=layout(tp_size))
    model.save_pretrained(directory, **options)
    assert (directory / "config.json").is_file(), "a rank went on before the directory was complete"


def _stored(directory: Path) -> Weights:
    """Everything in the safetensors files of a directory; no name may be stored twice."""
    weights: Weights = {}
    for path in sorted(directory.glob("*.safetensors")):
        content = load_file(path)
        assert not weights.keys() & content.keys()
        weights.update(content)
    return weights


@pytest.mark.parametrize(
    ("variant", "tp_size"),
    quick(itertools.product(("base", "untied"), (1, 2, 4)), [("base", 1), ("base", 4), ("untied", 2)]),
)
def test_stock_loads_what_is_saved(pool: Pool, stock_dir: StockDir, tmp_path: Path, variant: str, tp_size: int) -> None:
    """Catches a second copy of a tied embedding, names of ours, and Q, K and V gathered in the ranks' order."""
    run_at(pool, tp_size, _save, stock_dir(variant), tmp_path, tp_size, {})
    assert_all_equal(_stored(tmp_path), load_file(stock_dir(variant) / "model.safetensors"))
    model, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_all_equal(full_weights(model), full_weights(GPT2LMHeadModel.from_pretrained(stock_dir(variant))))


@pytest.mark.parametrize(
    ("options", "model_type", "prefix"), [({}, "megatron_gpt2", "Megatron"), ({"stock": True}, "gpt2", "")]
)
def test_config_says_what_was_asked(
    pool: Pool, stock_dir: StockDir, tmp_path: Path, options: dict[str, Any], model_type: str, prefix: str
) -> None:
    """Catches a layout, or anything else of ours, that leaks into config.json."""
    run_at(pool, 2, _save, stock_dir("base"), tmp_path, 2, options)
    saved = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((stock_dir("base") / "config.json").read_text())
    assert saved == {**original, "model_type": model_type, "architectures": [f"{prefix}GPT2LMHeadModel"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_saving_in_several_files(pool: Pool, stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches an index that does not match its files, and ranks that write different ones."""
    run_at(pool, 2, _save, stock_dir("base"), tmp_path, 2, {"max_shard_size": "50KB"})
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_all_equal(_stored(tmp_path), load_file(stock_dir("base") / "model.safetensors"))
    assert_all_equal(
        full_weights(MegatronGPT2LMHeadModel.from_pretrained(tmp_path)),
        full_weights(MegatronGPT2LMHeadModel.from_pretrained(stock_dir("base"))),
    )


def _save_every_head(root: Path, tp_size: int) -> dict[str, torch.Tensor]:
    """Stock-typed directories of all classes; the outputs each should give."""
    outputs = {}
    for name in HEADS.values():
        model_class = getattr(hf_megatron, f"Megatron{name}")
        model = model_class.from_pretrained(root / "stock" / name, distributed_config=layout(tp_size)).eval()
        model.save_pretrained(root / "left" / name, stock=True)
        outputs[name] = model(token_ids())[0].detach()
    return outputs


_LOAD_WITHOUT_US = """
import sys
sys.modules["hf_megatron"] = None  # importing it raises ImportError, installed or not
import json, torch, transformers
root, heads = sys.argv[1], json.loads(sys.argv[2])
outputs = {}
for auto, name in heads.items():
    model, info = getattr(transformers, auto).from_pretrained(f"{root}/left/{name}", output_loading_info=True)
    assert type(model).__module__ == "transformers.models.gpt2.modeling_gpt2" and type(model).__name__ == name, model
    assert not any(info.values()), info
    outputs[name] = model(torch.load(f"{root}/ids.pt"))[0].detach()
torch.save(outputs, f"{root}/outputs.pt")
"""


@pytest.mark.slow
def test_saved_as_stock_it_loads_without_this_package(pool: Pool, tmp_path: Path) -> None:
    """Catches a user who cannot leave: a directory that needs this package to be installed."""
    for name in HEADS.values():
        save_stock(tmp_path / "stock" / name, getattr(transformers, name), num_labels=3)
    expected = run_at(pool, 2, _save_every_head, tmp_path, 2)[0]
    torch.save(token_ids(), tmp_path / "ids.pt")
    command = [sys.executable, "-W", "ignore", "-c", _LOAD_WITHOUT_US, str(tmp_path), json.dumps(HEADS)]
    environment = {**os.environ, "PYTHONPATH": ""}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for name, output in torch.load(tmp_path / "outputs.pt").items():
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-5)


def _load_weights(directory: Path, tp_size: int, fsdp_size: int = 1) -> Weights:
    model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=layout(tp_size, fsdp_size))
    assert type(model).__name__.endswith("MegatronGPT2LMHeadModel")  # FSDP puts its name in front
    return full_weights(model)


@pytest.mark.parametrize(
    ("variant", "saved_at"),
    quick(
        itertools.product(("base", "untied"), ((1, 1), (2, 1), (3, 1), (4, 1), (2, 2))),
        [("base", (3, 1)), ("untied", (2, 2))],
    ),
)
def test_a_tp_directory_loads_at_any_layout(
    pool: Pool, stock_dir: StockDir, tmp_path: Path, variant: str, saved_at: tuple[int, int]
) -> None:
    """Catches boxes put together in the wrong order or along one dimension only, also in one plain process."""
    tp_size, fsdp_size = saved_at
    run_at(pool, tp_size * fsdp_size, save_distributed, stock_dir(variant), tmp_path / "tp", tp_size, fsdp_size)
    expected = full_weights(MegatronGPT2LMHeadModel.from_pretrained(stock_dir(variant)))
    for load_at in ((1, 1), (2, 1), (4, 1), (2, 2)):
        for weights in run_at(pool, load_at[0] * load_at[1], _load_weights, tmp_path / "tp", *load_at):
            assert_all_equal(weights, expected)


def test_a_distributed_save_replaces_the_old_one_whole(pool: Pool, stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches stale shards among the new ones, and a tokenizer or an optimizer lost with the old weights."""
    directory = tmp_path / "checkpoint"
    run_at(pool, 4, save_distributed, stock_dir("untied"), directory, 4)
    kept = {"tokenizer.json", "training_args.bin", "optimizer.bin", "adapter_model.safetensors"}
    for name in (*kept, "model.safetensors", "model.safetensors.index.json", "pytorch_model-00001-of-00002.bin"):
        (directory / name).write_text("old")
    (directory / "state").mkdir()
    (directory / "state" / "file").write_text("old")
    leftover = tmp_path / ".checkpoint.incomplete"  # of a save that was killed
    leftover.mkdir()
    (leftover / "shard-00009-model-00001-of-00001.safetensors").write_text("stale")

    run_at(pool, 2, save_distributed, stock_dir("base"), directory, 2)
    shards = {f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)}
    names = {path.name for path in directory.iterdir()}
    assert names == {*shards, *kept, "config.json", "generation_config.json", "state"}
    assert all((directory / name).read_text() == "old" for name in (*kept, "state/file"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    (directory / "adapter_model.safetensors").unlink()
    expected = full_weights(MegatronGPT2LMHeadModel.from_pretrained(stock_dir("base")))
    assert_all_equal(run_at(pool, 1, _load_weights, directory, 1)[0], expected)


def test_a_plain_save_over_a_distributed_one_removes_its_shards(
    pool: Pool, stock_dir: StockDir, tmp_path: Path
) -> None:
    """Catches a directory with two models in it, of which stock would load the old one."""
    run_at(pool, 2, save_distributed, stock_dir("untied"), tmp_path, 2)
    run_at(pool, 2, _save, stock_dir("base"), tmp_path, 2, {})
    assert_all_equal(_stored(tmp_path), load_file(stock_dir("base") / "model.safetensors"))


def _save_on_one_rank(stock: Path, directory: Path) -> None:
    model = MegatronGPT2LMHeadModel.from_pretrained(stock)
    if rank() == 0:
        model.save_pretrained(directory)
    dist.barrier()
    assert (directory / "model.safetensors").is_file()


def test_a_whole_model_may_be_saved_by_one_rank_alone(pool: Pool, stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches a barrier that waits for ranks that never come, as under DDP."""
    pool(2).run(_save_on_one_rank, stock_dir("base"), tmp_path / "saved", timeout=30)


def _save_twice(stock: Path, directory: Path) -> None:
    """A full save, changed weights, and a save of a state dict the caller chose."""
    model = MegatronGPT2LMHeadModel.from_pretrained(stock, distributed_config=layout(2))
    model.save_pretrained(directory / "first", is_main_process=rank() == 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(directory / "second", state_dict=model.state_dict())


def test_arguments_of_stock_are_honoured(pool: Pool, stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches `is_main_process` and `state_dict` lost on the way to the stock method."""
    pool(2).run(_save_twice, stock_dir("base"), tmp_path)
    original = load_file(stock_dir("base") / "model.safetensors")
    assert_all_equal(_stored(tmp_path / "first"), original)
    assert_all_equal(_stored(tmp_path / "second"), {name: 2 * value for name, value in original.items()})


def test_a_distributed_save_for_stock_is_refused(stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches a directory that claims to be stock and is not."""
    model = MegatronGPT2LMHeadModel.from_pretrained(stock_dir("base"))
    with pytest.raises(UnsupportedError, match="stock=True with distributed_checkpoint=True"):
        model.save_pretrained(tmp_path / "saved", stock=True, distributed_checkpoint=True)
    assert not (tmp_path / "saved").exists()


def test_a_distributed_save_does_not_replace_the_current_directory(
    stock_dir: StockDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a process whose working directory was renamed and deleted under it."""
    model = MegatronGPT2LMHeadModel.from_pretrained(stock_dir("base"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DestinationError, match="a directory of its own"):
        model.save_pretrained(".", distributed_checkpoint=True)
    assert list(tmp_path.iterdir()) == []
