"""What adapters on a cut model do not have is refused by name, before the model is touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
from peft import IA3Config, LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from hf_megatron.errors import UnsupportedError
from hf_megatron.peft import get_peft_model
from tests.models.reference import Pool
from tests.peft.adapters import Case, our_base, our_model, stock_base, stock_model


@pytest.mark.parametrize("targets", [["c_attn"], ["wte"], r".*\.mlp\..*"])
def test_plain_peft_names_this_module(gpt2: Case, targets: Any) -> None:
    """Catches the plain call, whose adapters would be cut wrong, or its error, which names layers nobody has."""
    with pytest.raises(UnsupportedError, match=r"hf_megatron\.peft\.get_peft_model"):
        peft.get_peft_model(our_base(gpt2), LoraConfig(target_modules=targets))


@pytest.mark.parametrize("targets", [["classifier"], "all-linear"])
def test_plain_peft_on_replicated_layers_names_this_module(classifier: Case, targets: Any) -> None:
    """Catches replicated layers, which are linear layers to peft, and their adapters no DTensors."""
    with pytest.raises(UnsupportedError, match=r"hf_megatron\.peft\.get_peft_model"):
        peft.get_peft_model(our_base(classifier), LoraConfig(target_modules=targets))


def test_plain_peft_finds_no_linear_layer_in_gpt2(gpt2: Case) -> None:
    """Catches a layer that looks linear to peft, which would adapt that one alone."""
    with pytest.raises(ValueError, match="No `target_modules`"):
        peft.get_peft_model(our_base(gpt2), LoraConfig(target_modules="all-linear"))


def test_loading_with_plain_peft_names_this_module(gpt2: Case, tmp_path: Any) -> None:
    """Catches the plain call where an adapter is loaded."""
    stock_model(gpt2).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"hf_megatron\.peft\.load_adapter"):
        PeftModel.from_pretrained(our_base(gpt2), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["c_attn"], use_dora=True), "use_dora=True"),
        (LoraConfig(target_modules=["c_attn"], lora_bias=True), "lora_bias=True"),
        (LoraConfig(target_modules=["c_attn"], layer_replication=[(0, 2), (1, 2)]), "layer_replication="),
        (LoraConfig(target_modules=["c_attn"], trainable_token_indices=[1]), "trainable_token_indices="),
        (LoraConfig(target_modules=["c_attn"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(target_modules=["c_attn", "wte"]), "target_modules: transformer.wte"),
        (LoraConfig(target_modules=["lm_head"]), "target_modules: lm_head"),
        (LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"]), "modules_to_save: transformer.wte"),
        (LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"]), "modules_to_save: lm_head"),
        (IA3Config(target_modules=["c_attn"], feedforward_modules=[]), "IA3Config"),
    ],
    ids=lambda value: value.split("=")[0].split(":")[-1].strip() if isinstance(value, str) else "",
)
def test_unsupported_settings_are_refused_before_anything_changes(gpt2: Case, config: Any, message: str) -> None:
    """Catches a setting that is silently left out, and a model left half adapted."""
    model = our_base(gpt2)
    with pytest.raises(UnsupportedError, match=message.replace("(", r"\(")):
        get_peft_model(model, config)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    get_peft_model(model, gpt2.config)


def test_a_stock_model_is_referred_to_peft(gpt2: Case) -> None:
    """Catches an AttributeError from within, where the model is not one of this package."""
    with pytest.raises(UnsupportedError, match=r"use peft\.get_peft_model"):
        get_peft_model(stock_base(gpt2), gpt2.config)


def _merge(case: Case) -> None:
    with pytest.raises(UnsupportedError, match="FSDP has cut once more"):
        our_model(case).merge_adapter()


@pytest.mark.parametrize("layout", [{"tp_size": 1, "fsdp_size": 2}, {"tp_size": 2, "fsdp_size": 2}])
def test_merging_under_fsdp_is_refused(pool: Pool, gpt2: Case, layout: dict[str, int]) -> None:
    """Catches a product of full size that is added to a part, or whatever then fails."""
    pool(layout["tp_size"] * layout["fsdp_size"]).run(_merge, replace(gpt2, layout=layout))
