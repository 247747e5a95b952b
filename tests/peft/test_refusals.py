"""What adapters on a cut model do not have is refused by name, before the model is touched."""

from typing import Any

import peft
import pytest
from peft import IA3Config, LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from hf_megatron.errors import UnsupportedError
from hf_megatron.peft import get_peft_model
from tests.live import on_live_ranks
from tests.peft.adapters import Case, our_base, our_model, stock_base, stock_model


@pytest.mark.parametrize(
    ("case", "targets"),
    [
        *(("gpt2", targets) for targets in (["c_attn"], ["wte"], r".*\.mlp\..*", "all-linear")),
        *(("classifier", targets) for targets in (["classifier"], "all-linear")),
    ],
    indirect=["case"],
)
def test_plain_peft_names_this_module(case: Case, targets: Any) -> None:
    """Catches the plain call, whose adapters would be cut wrong, and its own error, which names layers nobody has."""
    finds_none = (case.head, targets) == ("LMHeadModel", "all-linear")
    message = "No `target_modules`" if finds_none else r"hf_megatron\.peft\.get_peft_model"
    with pytest.raises(ValueError if finds_none else UnsupportedError, match=message):
        peft.get_peft_model(our_base(case), LoraConfig(target_modules=targets))


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
    """Catches a setting silently left out, a model left half adapted, and an error from within for a stock one."""
    model = our_base(gpt2)
    with pytest.raises(UnsupportedError, match=message.replace("(", r"\(")):
        get_peft_model(model, config)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    get_peft_model(model, gpt2.config)
    with pytest.raises(UnsupportedError, match=r"use peft\.get_peft_model"):
        get_peft_model(stock_base(gpt2), gpt2.config)


@pytest.mark.parametrize("world_size", [2, 4])
@on_live_ranks()
def test_merging_under_fsdp_is_refused(gpt2: Case, world_size: int) -> None:
    """Catches a product of full size that is added to a part, or whatever then fails; without a cut by columns too."""
    with pytest.raises(UnsupportedError, match="FSDP has cut once more"):
        our_model(gpt2.at(world_size // 2, fsdp_size=2)).merge_adapter()
