"""WikiText-103 perplexity against a loop that is slow and obviously right."""

from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_megatron import MegatronGPT2LMHeadModel
from hf_megatron.errors import DataError
from hf_megatron.paper.evaluation import detokenize_wikitext, evaluate_wikitext103
from hf_megatron.paper.evaluation.scoring import encode, logits_at
from hf_megatron.paper.evaluation.wikitext103 import Window, windows
from tests.evaluation.models import TEXT, WINDOW, load, slow_losses
from tests.models.reference import Pool, layout, run_at


def _evaluate(directory: Path, tp_size: int, **options: Any) -> dict[str, Any]:
    model = MegatronGPT2LMHeadModel.from_pretrained(directory, distributed_config=layout(tp_size)).eval()
    _, tokenizer = load(directory)
    return vars(evaluate_wikitext103(model, tokenizer, TEXT, **options))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_perplexity_is_the_slow_loop_s(tp_size: int, model_dir: Path, pool: Pool) -> None:
    """Catches a token predicted twice or never, or without its context, and shards of logits taken for all."""
    model, tokenizer = load(model_dir)
    ids = encode(tokenizer, detokenize_wikitext(TEXT))
    losses = slow_losses(model, ids, WINDOW, 8)
    original = len(TEXT.strip().split(" "))
    for result in run_at(pool, tp_size, _evaluate, model_dir, tp_size, stride=8, batch_size=5):
        assert result["perplexity"] == pytest.approx(exp(sum(losses) / original), rel=1e-6)
        assert result["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert (result["tokens"], result["original_tokens"]) == (len(ids) - 1, original)
    # What a window carries over makes a difference; else it would not be noticed if it did not.
    assert _evaluate(model_dir, 1, stride=WINDOW)["loss"] != pytest.approx(sum(losses) / len(losses), rel=1e-3)


@pytest.mark.parametrize("num_tokens", [2, 5, 1024, 1025, 1026, 1056, 1057, 1058, 1088, 5000, 270_330])
def test_windows_predict_every_token_once(num_tokens: int) -> None:
    """Catches an end that is cut off, windows longer than the model, and context shorter than the stride leaves."""
    found = list(windows(num_tokens, 1024, 32))
    ends = [window.start + window.length + 1 for window in found]
    predicted = [
        token for window, end in zip(found, ends, strict=True) for token in range(end - window.predictions, end)
    ]
    assert predicted == list(range(1, num_tokens))
    assert all(window.length <= 1024 for window in found)
    assert [later.start - earlier.start for earlier, later in pairwise(found)] == [32] * (len(found) - 1)
    assert all(window.length - window.predictions == 992 for window in found[1:])
    if num_tokens == 270_330:  # the paper's test set
        assert (found[0], len(found)) == (Window(0, 1024, 1024), 8_417)


@pytest.mark.parametrize(
    ("tokenised", "text"),
    [
        ("a 1 @,@ 000 @.@ 5 well @-@ known", "a 1,000.5 well-known"),
        ("one , two ; three : four . Five ! Six ? Seven", "one, two; three: four. Five! Six? Seven"),
        ("he said \" yes , so \" and ( later ) ' no ' [ sic ] { x }", "he said \"yes, so\" and (later) 'no' [sic] {x}"),
        ("the keeper 's house , the keepers ' house", "the keeper's house, the keepers' house"),
        (" \n = Title = \n \n = = Section = = \n = = = Sub = = = \n", "\n= Title =\n\n== Section ==\n=== Sub ===\n"),
        ("21 \N{DEGREE SIGN} N of it", "21\N{DEGREE SIGN}N of it"),
    ],
)
def test_detokenizer(tokenised: str, text: str) -> None:
    """Catches a rule that is lost, or applied in another order."""
    assert detokenize_wikitext(tokenised) == text


def test_the_head_is_computed_only_where_a_loss_is_taken(model_dir: Path) -> None:
    """Catches logits of whole windows, which cost more than all layers of a small model."""
    model, tokenizer = load(model_dir)
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, hidden: rows.append(hidden[0].shape[:-1].numel()))
    result = evaluate_wikitext103(model, tokenizer, TEXT, stride=8)
    assert sum(rows) == result.tokens


def test_models_that_cannot_leave_logits_out_are_evaluated_too(model_dir: Path) -> None:
    """Catches a model whose forward knows no ``logits_to_keep`` being refused, or scored at the wrong positions."""
    model, _ = load(model_dir)

    class Wrapped:
        config, device = model.config, model.device
        forward = __call__ = staticmethod(lambda input_ids: model(input_ids))

    ids, positions = torch.arange(20).view(2, 10), torch.tensor([3, 9])
    with torch.no_grad():
        assert torch.equal(logits_at(Wrapped(), ids, positions), model(ids).logits[:, [3, 9]])


def test_progress_says_how_long_it_will_take(
    model_dir: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an evaluation of an hour that does not say so."""
    model, tokenizer = load(model_dir)
    with caplog.at_level("INFO", logger="hf_megatron"):
        evaluate_wikitext103(model, tokenizer, TEXT, stride=4, show_progress=True)
    assert "Expected for all" in caplog.text
    assert "windows" in capfd.readouterr().err
    evaluate_wikitext103(model, tokenizer, TEXT, stride=24)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": 33, "window": 32}, {"window": WINDOW + 1}])
def test_impossible_windows_are_refused(options: dict[str, Any], model_dir: Path) -> None:
    """Catches tokens that no window predicts, and positions the model does not have."""
    model, tokenizer = load(model_dir)
    with pytest.raises(DataError, match=f"{WINDOW} positions"):
        evaluate_wikitext103(model, tokenizer, TEXT, **options)
    with pytest.raises(DataError, match="0 tokens"):
        evaluate_wikitext103(model, tokenizer, "")
