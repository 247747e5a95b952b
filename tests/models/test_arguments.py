"""Arguments of a forward: each has a use or is refused by its name, and the cache may have either of its two names."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_megatron.errors import UnexpectedArgumentError
from hf_megatron.models.forward_arguments import CACHE
from tests.models.architectures import BERTS, GPT2, LAYERS, ModelCase, StockDir, token_ids
from tests.models.reference import assert_agrees

IDS = token_ids(2, 5)
CLASSES = [(case, head) for case in (GPT2, BERTS[1]) for head in case.heads]
BOTH_NAMES = ["cache", "past_key_values"]
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def _model(case: ModelCase, head: str | None = None, **options: Any) -> Any:
    return case.build(head=head, config=case.config(), seed=0, **options).eval()


def _cache(ids: torch.Tensor = IDS) -> Any:
    return _model(GPT2, "Model")(ids, use_cache=True)[CACHE]


@pytest.mark.parametrize(("case", "head"), CLASSES)
def test_arguments_without_a_use_are_refused(case: ModelCase, head: str) -> None:
    """Catches a misspelled argument, an encoder's states or one of two caches ignored, and a cache BERT never reads."""
    refused: list[tuple[dict[str, Any], str]] = [
        ({"no_such_argument": 1}, r"got no_such_argument, which neither it nor .* \(sdpa\)"),
        *(
            ({n: torch.ones(2, 5)}, f"{n}: .* leave it out")
            for n in ("encoder_hidden_states", "encoder_attention_mask")
        ),
    ]
    if head == "LMHeadModel":
        refused.append(({name: _cache() for name in BOTH_NAMES}, "the same argument; give one"))
    if not case.is_causal:
        refused += [({name: _cache()}, "past_key_values: these models are encoders") for name in BOTH_NAMES]
    model = _model(case, head)
    for (given, message), is_training in itertools.product(refused, (False, True)):
        with pytest.raises(UnexpectedArgumentError, match=message):
            model.train(is_training)(input_ids=IDS[:, None] if head == "ForMultipleChoice" else IDS, **given)


@pytest.mark.parametrize("head", GPT2.heads)
def test_the_cache_under_either_name(head: str) -> None:
    """Catches a name that is swallowed: each step would then see one token."""
    model, answers = _model(GPT2, head), []
    for argument in BOTH_NAMES:
        cache = _cache(IDS[:, :4])
        answers.append(model(IDS[:, 4:], **{argument: cache}, use_cache=True)[0])
        assert cache.get_seq_length() == 5
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], model(IDS[:, 4:], cache=None)[0])


@pytest.mark.skipif(CACHE != "cache", reason="transformers has not renamed it yet")
def test_the_older_name_is_deprecated() -> None:
    """Catches a name that stops working one day without a warning before; the newer one must give none."""
    model = _model(GPT2, "LMHeadModel")
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        model(IDS[:, 4:], past_key_values=_cache(IDS[:, :4]), use_cache=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS[:, 4:], cache=_cache(IDS[:, :4]), use_cache=True)


def test_the_bounds_of_packed_sequences_need_a_mask_that_follows_them() -> None:
    """Catches sequences packed into one that attend to each other: only flash attention reads these bounds."""
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "max_length_q": 3, "seq_idx": torch.tensor([[0, 0, 0, 1, 1]])}
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    refused = r"got cu_seq_lens_q, max_length_q, seq_idx, .* need flash attention"
    bidirectional = [(case, {"position_ids": positions}) for case in BERTS]
    others = ({"attention_mask": torch.ones_like(IDS)}, {"is_causal": False}, {"past_key_values": _cache()})
    causal = [(GPT2, {"position_ids": positions, **other}) for other in others]
    for case, given in [(GPT2, {}), *bidirectional, *causal]:
        model = _model(case)
        with pytest.raises(UnexpectedArgumentError, match=refused):
            model(IDS, **packed, **given)
        assert model(IDS, cu_seq_lens_q=None)[0].isfinite().all()


def test_a_kernel_of_the_users_own_gets_what_it_names() -> None:
    """Catches an argument that a registered attention kernel asks for and never gets."""
    seen = []

    def kernel(module: Any, query: Any, key: Any, value: Any, mask: Any, temperature: float = 1.0, **_: Any) -> Any:
        seen.append(temperature)
        return value.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("named_temperature", kernel)
    model = _model(GPT2, attn_implementation="named_temperature")
    model(IDS, temperature=0.5)
    assert seen == [0.5] * LAYERS
    with pytest.raises(UnexpectedArgumentError, match=r"got heat, .* \(named_temperature\)"):
        model(IDS, heat=0.5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_is_causal_equals_stock(stock_dir: StockDir, attention: str, is_causal: bool) -> None:
    """Catches a model asked to see the whole sequence that looks back only, with and without a mask."""
    stock = GPT2.load_stock(stock_dir(), dtype=torch.float64, attention=attention)
    ours = GPT2.load(stock_dir(), dtype=torch.float64, attn_implementation=attention)
    for mask in (None, torch.tensor([[1] * 5, [1] * 3 + [0] * 2])):
        expected = stock(IDS, attention_mask=mask, is_causal=is_causal).logits
        assert_agrees("logits", ours(IDS, attention_mask=mask, is_causal=is_causal).logits, expected)
        assert not torch.allclose(expected[0], stock(IDS, attention_mask=mask, is_causal=not is_causal).logits[0])


def test_is_causal_reaches_attention_with_dropout() -> None:
    """Catches the attention written out, which draws dropout on a CPU, looking back only where no mask is made."""
    model = GPT2.ours()(GPT2.config(**GPT2.dropout(1e-9, 0.0))).train()
    model.fuses_head_and_loss = False
    trained = model(IDS, is_causal=False).logits
    torch.testing.assert_close(trained, model.eval()(IDS, is_causal=False).logits)


def test_an_encoder_takes_use_cache() -> None:
    """Catches what pipelines pass, and configurations say, refused: an encoder answers without a cache either way."""
    model = _model(BERTS[0], "Model")
    assert torch.equal(model(IDS, use_cache=False)[0], model(IDS, use_cache=True)[0])
