"""Methods of PreTrainedModel that stumble over modules that are not the stock ones."""

import gc
import weakref

import pytest
import torch

from tests.models.architectures import ARCHITECTURES, ModelCase

_MODELS = [(case, head) for case in ARCHITECTURES for head in case.heads]


@pytest.mark.parametrize(("case", "head"), _MODELS)
def test_attention_can_be_switched(case: ModelCase, head: str) -> None:
    """Catches a model that keeps its attention kernel, because transformers looks for ours where stock has it."""
    model = case.ours(head)(case.config())
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation


@pytest.mark.parametrize(("case", "head"), _MODELS)
def test_a_deleted_model_is_freed_at_once(case: ModelCase, head: str) -> None:
    """Catches references in a circle, with which weights stay in memory until Python looks for garbage."""
    model = case.ours(head)(case.config())
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    gc.disable()
    try:
        del model
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_graph_that_is_retained_gives_the_same_gradients_again(case: ModelCase, is_tied: bool) -> None:
    """Catches a backward pass that changes what it has saved, or hands it out: the fused loss, the tied weight."""
    torch.manual_seed(0)
    model = case.ours()(case.config(tie_word_embeddings=is_tied)).train()
    loss = model(**case.batch()).loss
    unused = case.unused(is_tied=is_tied)
    parameters = [parameter for name, parameter in model.named_parameters() if name not in unused]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    doubled = torch.autograd.grad(2 * loss, parameters, retain_graph=True)
    last = torch.autograd.grad(3 * loss, parameters)
    for kept, copy, two, three in zip(first, copies, doubled, last, strict=True):
        assert torch.equal(kept, copy)
        torch.testing.assert_close(two, 2 * copy)
        torch.testing.assert_close(three, 3 * copy)
