"""Arguments of a forward: each has a use or is refused by its name, and the cache may have either of its two names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_megatron
from hf_megatron import MegatronBertConfig, MegatronBertModel, MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.errors import UnexpectedArgumentError
from hf_megatron.models.arguments import CACHE
from tests.models.bert.reference import TINY as TINY_BERT
from tests.models.reference import TINY, assert_agrees, save_stock, token_ids

IDS = token_ids(2, 5)
GPT2_CLASSES = [name for name in hf_megatron.__all__ if name.startswith("MegatronGPT2") and "Config" not in name]
BERT_CLASSES = [name for name in hf_megatron.__all__ if name.startswith("MegatronBert") and "Config" not in name]
BOTH_NAMES = ["cache", "past_key_values"]


def _model(name: str, **changes: Any) -> Any:
    is_gpt2 = name in GPT2_CLASSES
    config = MegatronGPT2Config(**TINY, **changes) if is_gpt2 else MegatronBertConfig(**TINY_BERT, **changes)
    return getattr(hf_megatron, name)(config).eval()


def _ids(name: str) -> torch.Tensor:
    return IDS[:, None] if name == "MegatronBertForMultipleChoice" else IDS


@pytest.mark.parametrize("name", [*GPT2_CLASSES, *BERT_CLASSES])
def test_unknown_arguments_are_refused(name: str) -> None:
    """Catches a misspelled argument that changes nothing, in training as in evaluation."""
    model = _model(name)
    for is_training in (False, True):
        with pytest.raises(TypeError, match=r"got no_such_argument, which neither it nor .* \(sdpa\)"):
            model.train(is_training)(input_ids=_ids(name), no_such_argument=1)


@pytest.mark.parametrize("name", [*GPT2_CLASSES, *BERT_CLASSES])
@pytest.mark.parametrize("argument", ["encoder_hidden_states", "encoder_attention_mask"])
def test_there_is_no_cross_attention(name: str, argument: str) -> None:
    """Catches an encoder's states that are left out of the computation without a word."""
    with pytest.raises(UnexpectedArgumentError, match=f"{argument}: .* leave it out"):
        _model(name)(input_ids=_ids(name), **{argument: torch.ones(2, 5)})


@pytest.mark.parametrize("name", BERT_CLASSES)
@pytest.mark.parametrize("argument", BOTH_NAMES)
def test_an_encoder_has_no_cache(name: str, argument: str) -> None:
    """Catches a cache that BERT would fill and never read."""
    cache = _model("MegatronGPT2Model")(IDS, use_cache=True)[CACHE]
    with pytest.raises(UnexpectedArgumentError, match="past_key_values: these models are encoders"):
        _model(name)(input_ids=_ids(name), **{argument: cache})


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # by the forwards of stock heads
@pytest.mark.parametrize("name", GPT2_CLASSES)
def test_the_cache_under_either_name(name: str) -> None:
    """Catches a name that is swallowed: each step would then see one token."""
    model, answers = _model(name), []
    for argument in BOTH_NAMES:
        cache = _model("MegatronGPT2Model")(IDS[:, :4], use_cache=True)[CACHE]
        answers.append(model(IDS[:, 4:], **{argument: cache}, use_cache=True)[0])
        assert cache.get_seq_length() == 5
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], model(IDS[:, 4:], cache=None)[0])


def test_two_caches_are_refused() -> None:
    """Catches one of two caches left out."""
    caches = [_model("MegatronGPT2Model")(IDS, use_cache=True)[CACHE] for _ in range(2)]
    with pytest.raises(UnexpectedArgumentError, match="the same argument; give one"):
        _model("MegatronGPT2Model")(IDS, cache=caches[0], past_key_values=caches[1])


def test_the_bounds_of_packed_sequences_need_flash_attention() -> None:
    """Catches sequences packed into one that attend to each other: only flash attention reads these bounds."""
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    for model in (_model("MegatronGPT2LMHeadModel"), _model("MegatronBertModel")):
        with pytest.raises(UnexpectedArgumentError, match=r"got cu_seq_lens_q, max_length_q, .* need flash attention"):
            model(IDS, cu_seq_lens_q=bounds, max_length_q=3)
        assert model(IDS, cu_seq_lens_q=None)[0].isfinite().all()


def test_a_kernel_of_the_users_own_gets_what_it_names() -> None:
    """Catches an argument that a registered attention kernel asks for and never gets."""
    seen = []

    def kernel(module: Any, query: Any, key: Any, value: Any, mask: Any, temperature: float = 1.0, **_: Any) -> Any:
        seen.append(temperature)
        return value.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("named_temperature", kernel)
    model = _model("MegatronGPT2LMHeadModel", attn_implementation="named_temperature")
    model(IDS, temperature=0.5)
    assert seen == [0.5] * TINY["n_layer"]
    with pytest.raises(UnexpectedArgumentError, match=r"got heat, .* \(named_temperature\)"):
        model(IDS, heat=0.5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_is_causal_equals_stock(tmp_path: Any, attention: str, is_causal: bool) -> None:
    """Catches a model asked to see the whole sequence that looks back only, with and without a mask."""
    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": attention}
    save_stock(tmp_path)
    stock, ours = (c.from_pretrained(tmp_path, **options) for c in (GPT2LMHeadModel, MegatronGPT2LMHeadModel))
    for mask in (None, torch.tensor([[1] * 5, [1] * 3 + [0] * 2])):
        expected = stock(IDS, attention_mask=mask, is_causal=is_causal).logits
        assert_agrees("logits", ours(IDS, attention_mask=mask, is_causal=is_causal).logits, expected)
        assert not torch.allclose(expected[0], stock(IDS, attention_mask=mask, is_causal=not is_causal).logits[0])


def test_is_causal_reaches_attention_with_dropout() -> None:
    """Catches the attention written out, which draws dropout on a CPU, looking back only where no mask is made."""
    config = MegatronGPT2Config(**{**TINY, "attn_pdrop": 1e-9})
    model = MegatronGPT2LMHeadModel(config).train()
    model.fuses_head_and_loss = False
    torch.manual_seed(0)
    trained = model(IDS, is_causal=False).logits
    torch.testing.assert_close(trained, model.eval()(IDS, is_causal=False).logits)


def test_an_encoder_takes_use_cache() -> None:
    """Catches what pipelines pass, and configurations say, refused: an encoder answers without a cache either way."""
    model = MegatronBertModel(MegatronBertConfig(**TINY_BERT)).eval()
    assert torch.equal(model(IDS, use_cache=False)[0], model(IDS, use_cache=True)[0])
