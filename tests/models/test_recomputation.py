"""What activation checkpointing computes again: whole layers, or attention only. Dropout's tests have the numbers."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hf_megatron.errors import UnsupportedError
from hf_megatron.models.attention import ParallelAttention
from hf_megatron.models.forward_arguments import CACHE
from hf_megatron.tensor_parallel import RowParallelLinear
from tests.models.architectures import ARCHITECTURES, GPT2, ModelCase
from tests.training.runs import Run, make_trainer

LAYERS = 4
IDS = torch.arange(2 * 16).view(2, 16)
SELECTIVE = {"recompute": "selective"}


def _model(case: ModelCase = GPT2, attention: str = "eager") -> Any:
    config = case.config(hidden_size=24, num_hidden_layers=LAYERS)
    return case.build(head=case.language_model, config=config, seed=0, attn_implementation=attention)


def _computed(model: Any) -> dict[str, int]:
    """How often a training step computes attention, and the products behind attention and MLP."""
    counted: Counter[str] = Counter()
    explicit = ParallelAttention._explicit

    def attend(*args: Any) -> Any:
        counted["attention"] += 1
        return explicit(*args)

    def count_product(module: nn.Module, *_: Any) -> None:
        counted["product"] += 1

    hooks = [m.register_forward_hook(count_product) for m in model.modules() if isinstance(m, RowParallelLinear)]
    with patch.object(ParallelAttention, "_explicit", attend):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
    for hook in hooks:
        hook.remove()
    return dict(counted)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_what_is_computed_again(case: ModelCase) -> None:
    """Catches the option not reaching a layer's attention, whole layers recomputed with it, and one that stays on."""
    model = _model(case)
    once = {"attention": LAYERS, "product": 2 * LAYERS}
    assert _computed(model) == once
    model.activation_checkpointing_enable(SELECTIVE)
    assert model.is_activation_checkpointing
    assert _computed(model) == {**once, "attention": 2 * LAYERS}
    model.activation_checkpointing_enable(SELECTIVE, every_n_layers=2)
    assert _computed(model) == {**once, "attention": LAYERS + LAYERS // 2}
    model.activation_checkpointing_enable()
    assert _computed(model)["product"] > once["product"]
    model.activation_checkpointing_enable(SELECTIVE)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    assert _computed(model) == once
    with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
        model.gradient_checkpointing_enable(SELECTIVE)  # the old name
    assert _computed(model)["attention"] == 2 * LAYERS


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_fused_kernel_is_left_to_itself(case: ModelCase) -> None:
    """Catches a kernel that keeps no scores run twice, for nothing."""
    model = _model(case, "sdpa")
    model.activation_checkpointing_enable(SELECTIVE)
    kernel = torch.nn.functional.scaled_dot_product_attention
    with patch.object(torch.nn.functional, "scaled_dot_product_attention", wraps=kernel) as attend:
        assert _computed(model) == {"product": 2 * LAYERS}
    assert attend.call_count == LAYERS


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_generation_is_what_it_was(recompute: str, is_training: bool) -> None:
    """Catches a cache of keys and values left out, or filled twice, where nobody trains: steps would see one token."""
    model = _model().train(is_training)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 5)}
    expected = model.generate(IDS[:, :5], **options)
    model.activation_checkpointing_enable({"recompute": recompute})
    assert torch.equal(model.generate(IDS[:, :5], **options), expected)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS[:, :5], **{CACHE: cache})
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("recompute", ["none", "Selective", None, True])
def test_other_values_are_refused(recompute: Any) -> None:
    """Catches a value with a slip of the pen that recomputes everything, or nothing, without a word."""
    model = _model()
    with pytest.raises(UnsupportedError, match=f"recompute={recompute!r}.*'full'.*'selective'.*off"):
        model.activation_checkpointing_enable({"recompute": recompute})
    assert not model.is_activation_checkpointing


def test_trainer_passes_the_option_on(tmp_path: Path) -> None:
    """Catches arguments of a training run that no longer reach the model as they are."""
    given = {**SELECTIVE, "use_reentrant": False}
    arguments: dict[str, Any] = {"activation_checkpointing": True, "activation_checkpointing_kwargs": given}
    run = Run(GPT2.save_stock(tmp_path), tmp_path / "run", arguments={**arguments, "max_steps": 1, "logging_steps": 9})
    trainer = make_trainer(replace(run, config=GPT2.dropout(0.1, 0.0)))  # for which attention is written out
    with patch.object(ParallelAttention, "_explicit", autospec=True, side_effect=ParallelAttention._explicit) as attend:
        trainer.train()
    assert attend.call_count == 2 * trainer.model.config.num_hidden_layers
