"""Adapters on disk are ordinary ones, whichever side wrote them, and merged weights are ordinary weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hf_megatron.errors import CheckpointIncompleteError
from hf_megatron.peft import load_adapter
from tests.live import on_live_ranks
from tests.models.reference import Pool, assert_agrees, assert_all_agree, full_weights, rank
from tests.peft.adapters import (
    Case,
    logits,
    our_base,
    our_model,
    quiet_peft,
    stock_base,
    stock_model,
    trainable_weights,
)

CASES = ("gpt2", "bert", "classifier")


def _save(case: Case, directory: Path) -> torch.Tensor:
    model = our_model(case)
    model.save_pretrained(directory)
    return logits(case, model)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_what_two_ranks_save_is_an_ordinary_adapter(pool: Pool, tmp_path: Path, case: Case) -> None:
    """Catches shards, names, shapes or settings that stock peft does not understand."""
    stock_model(case).save_pretrained(tmp_path / "stock")
    expected = pool(2).run(_save, case.at(2), tmp_path / "ours")[0]
    names, stock_names = ({path.name for path in (tmp_path / by).iterdir()} for by in ("ours", "stock"))
    assert names == stock_names
    weights, stock_weights = (load_file(tmp_path / by / "adapter_model.safetensors") for by in ("ours", "stock"))
    assert_all_agree("weight", weights, stock_weights)
    configs = [json.loads((tmp_path / by / "adapter_config.json").read_text()) for by in ("ours", "stock")]
    assert len({repr({**config, "target_modules": sorted(config["target_modules"])}) for config in configs}) == 1
    with quiet_peft():
        loaded = PeftModel.from_pretrained(stock_base(case), tmp_path / "ours")
    assert_agrees("logits on the stock model", logits(case, loaded), expected)


@pytest.mark.parametrize("tp_size", [2, *(pytest.param(degree, marks=pytest.mark.slow) for degree in (1, 4))])
@pytest.mark.parametrize("case", CASES, indirect=True)
@on_live_ranks()
def test_an_ordinary_adapter_loads_at_any_degree(tmp_path: Path, case: Case, tp_size: int) -> None:
    """Catches an adapter that each rank takes whole, cuts otherwise than its weight, or does not load at all."""
    stock, directory = stock_model(case), tmp_path / f"{rank()}"
    stock.save_pretrained(directory)
    model = load_adapter(our_base(case.at(tp_size)), directory)
    assert not any("lora_" in name for name in trainable_weights(model))
    assert_agrees("logits", logits(case, model), logits(case, stock))


def test_an_adapter_that_lacks_weights_is_refused(gpt2: Case, tmp_path: Path) -> None:
    """Catches layers that keep their random initial adapter, of which peft only warns."""
    stock_model(gpt2).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    del weights["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"]
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointIncompleteError, match=r"lacks .*h\.1\.attn\.c_attn\.lora_B"):
        load_adapter(our_base(gpt2), tmp_path)


def _save_again(case: Case, directory: Path) -> None:
    model = our_model(case)
    model.add_adapter("other", replace(case, lora={**case.lora, "r": 2}).config)
    model.save_pretrained(directory)


def test_saving_replaces_the_adapter_and_nothing_else(pool: Pool, gpt2: Case, tmp_path: Path) -> None:
    """Catches a save that takes base weights or a model card away, and a second adapter that is lost."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").write_text("the base weights")
    (directory / "README.md").write_text("---\nlibrary_name: peft\n---\nMy own words.\n")
    pool(2).run(_save_again, gpt2.at(2), directory)
    assert (directory / "model.safetensors").read_text() == "the base weights"
    assert "My own words." in (directory / "README.md").read_text()
    assert (directory / "other" / "adapter_model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_save_keeps_the_old_adapter(gpt2: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file that is written in place, and cut off."""
    model = our_model(gpt2)
    model.save_pretrained(tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()

    def break_off(tensors: Any, path: str, **options: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("peft.peft_model.safe_save_file", break_off)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def _merge(case: Case, directory: Path, safely: bool) -> tuple[torch.Tensor, torch.Tensor]:
    model = our_model(case)
    adapted = logits(case, model)
    base = full_weights(our_base(case))
    model.merge_adapter(safe_merge=safely)
    model.unmerge_adapter()
    unmerged = {
        # peft keeps a classification head beside the one that it trains.
        name.replace(".base_layer", "").replace(".original_module", ""): weight
        for name, weight in full_weights(model.get_base_model()).items()
    }
    assert_all_agree("unmerged", {name: unmerged[name] for name in base}, base)
    merged = model.merge_and_unload(safe_merge=safely)
    merged.save_pretrained(directory, stock=True)
    return adapted, logits(case, merged)


@pytest.mark.parametrize(
    ("case", "safely"), [("gpt2", False), ("gpt2", True), ("bert", False), ("classifier", False)], indirect=["case"]
)
def test_merged_weights_are_an_ordinary_model(pool: Pool, tmp_path: Path, case: Case, safely: bool) -> None:
    """Catches a product cut or transposed otherwise than its weight, also behind a shared f and of a whole layer."""
    adapted, merged = pool(2).run(_merge, case.at(2), tmp_path, safely)[0]
    assert_agrees("logits", merged, adapted)
    stock = stock_base(replace(case, directory=tmp_path))
    assert_agrees("logits of the stock model", logits(case, stock), adapted)


@on_live_ranks(2)
def test_a_safe_merge_that_overflows_on_one_rank_raises_on_all(gpt2: Case) -> None:
    """Catches a check that has no effect on weights that are cut, or on one rank only."""
    model = our_model(gpt2.at(2))
    lora_b = dict(model.named_parameters())["base_model.model.transformer.h.0.attn.c_attn.lora_B.default.weight"]
    if dist.get_rank() == 1:
        lora_b.to_local().detach().fill_(torch.inf)
    with pytest.raises(ValueError, match="'default' would make weights inf or nan"):
        model.merge_adapter(safe_merge=True)
