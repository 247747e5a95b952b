"""Methods of PreTrainedModel that stumble over modules that are not the stock ones."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

import hf_megatron
from hf_megatron import MegatronBertConfig, MegatronGPT2Config, MegatronGPT2LMHeadModel
from tests.models.reference import TINY, assert_all_equal, full_weights, tiny_config, token_ids

_CLASSES = [getattr(hf_megatron, name) for name in hf_megatron.__all__ if name.startswith("Megatron")]
_MODELS = [c for c in _CLASSES if issubclass(c, PreTrainedModel)]


def _build(model_class: Any) -> Any:
    if model_class.config_class is MegatronGPT2Config:
        return model_class(MegatronGPT2Config(**TINY))
    sizes = {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12}
    return model_class(MegatronBertConfig(**sizes, intermediate_size=96))


@pytest.mark.parametrize("model_class", _MODELS)
def test_attention_can_be_switched(model_class: Any) -> None:
    """Catches a model that keeps its attention kernel, because transformers looks for ours where stock has it."""
    model = _build(model_class)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("model_class", _MODELS)
def test_a_deleted_model_is_freed_at_once(model_class: Any) -> None:
    """Catches references in a circle, with which weights stay in memory until Python looks for garbage."""
    model = _build(model_class)
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    gc.disable()
    try:
        del model
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{"new_num_tokens": 140}, {"new_num_tokens": 100}, {"pad_to_multiple_of": 64}])
@pytest.mark.parametrize("is_tied", [True, False])
def test_resizing_the_vocabulary(is_tied: bool, options: dict[str, int]) -> None:
    """Catches a head that keeps the old size, and new rows that are not those of stock."""
    stock = GPT2LMHeadModel(tiny_config(tie_word_embeddings=is_tied))
    ours = MegatronGPT2LMHeadModel(MegatronGPT2Config(**TINY, tie_word_embeddings=is_tied))
    ours.load_state_dict({name: stock.state_dict()[name] for name in ours.state_dict()})
    for model in (stock, ours):
        torch.manual_seed(3)
        model.resize_token_embeddings(**options)
        model.eval()
    assert ours.config.vocab_size == stock.config.vocab_size == ours.lm_head.out_features
    assert_all_equal(full_weights(ours), {name: stock.state_dict()[name] for name in ours.state_dict()})
    input_ids = token_ids(vocab_size=100)
    torch.testing.assert_close(ours(input_ids).logits, stock(input_ids).logits)
    ours.train()(input_ids, labels=input_ids).loss.backward()


@pytest.mark.parametrize("is_tied", [True, False])
def test_resizing_without_the_mean(is_tied: bool) -> None:
    """Catches new rows that are left as memory was."""
    model = MegatronGPT2LMHeadModel(MegatronGPT2Config(**TINY, tie_word_embeddings=is_tied))
    before = full_weights(model)
    model.resize_token_embeddings(500, mean_resizing=False)
    names = ["transformer.wte.weight"] if is_tied else ["transformer.wte.weight", "lm_head.weight"]
    for name in names:
        after = full_weights(model)[name]
        assert torch.equal(after[:131], before[name])
        assert after[131:].std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_graph_that_is_retained_gives_the_same_gradients_again(is_tied: bool) -> None:
    """Catches a backward pass that changes what it has saved, or hands it out: the fused loss, the tied weight."""
    torch.manual_seed(0)
    model = MegatronGPT2LMHeadModel(MegatronGPT2Config(**TINY, tie_word_embeddings=is_tied)).train()
    ids = token_ids(2, 9)
    loss = model(input_ids=ids, labels=ids).loss
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    doubled = torch.autograd.grad(2 * loss, parameters, retain_graph=True)
    last = torch.autograd.grad(3 * loss, parameters)
    for kept, copy, two, three in zip(first, copies, doubled, last, strict=True):
        assert torch.equal(kept, copy)
        torch.testing.assert_close(two, 2 * copy)
        torch.testing.assert_close(three, 3 * copy)
