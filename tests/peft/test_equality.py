"""An adapted model computes what stock peft computes on the stock model, at every degree."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.live import on_live_ranks
from tests.models.reference import (
    assert_agrees,
    assert_all_agree,
    assert_all_equal,
    assert_replicas_equal,
    assert_same_on_all_ranks,
)
from tests.peft.adapters import Case, logits, our_base, our_model, stock_model, trainable_gradients, trainable_weights

CASES = ("gpt2", "bert", "classifier")
DEGREES = [2, *(pytest.param(degree, marks=pytest.mark.slow) for degree in (1, 4))]


@pytest.mark.parametrize("tp_size", DEGREES)
@pytest.mark.parametrize(
    ("case", "dropout"), [*((case, 0.0) for case in CASES), ("gpt2", 0.3), ("classifier", 0.3)], indirect=["case"]
)
@on_live_ranks()
def test_a_step_is_that_of_stock_peft(case: Case, dropout: float, tp_size: int) -> None:
    """Catches a half cut otherwise than its weight, sums missing or doubled, and masks that depend on the rank."""
    # With several draws per layer: the base layers' dropout is off, or its masks would differ from stock's.
    case = replace(case.at(tp_size), lora={**case.lora, "lora_dropout": dropout})
    stock, ours = stock_model(case), our_model(case)
    assert_all_equal(trainable_weights(ours), trainable_weights(stock))
    torch.manual_seed(3)
    expected = case.architecture.stock_step(stock.train(), {**case.inputs, **case.labels})[1]
    torch.manual_seed(3)
    loss = ours.train()(**case.inputs, **case.labels).loss
    assert_agrees("loss", loss, expected)
    assert_same_on_all_ranks("the random state afterwards", torch.rand(3))
    expected.backward()
    loss.backward()
    assert_all_agree("gradient", trainable_gradients(ours), trainable_gradients(stock))
    assert_replicas_equal(ours)


@pytest.mark.parametrize("share", ["fsdp_size", pytest.param("dp_replicate_size", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["gpt2", "classifier"], indirect=True)
@on_live_ranks(4)
def test_data_parallel_ranks_average_the_gradients(case: Case, share: str) -> None:
    """Catches adapters that each data-parallel rank trains on its own, as FSDP does not know them."""
    stock, ours = stock_model(case), our_model(case.at(2, **{share: 2}))
    data_parallel_rank = dist.get_rank() // 2
    for _ in range(2):
        losses = []
        for row in (0, 1):
            batch = {name: value[row : row + 1] for name, value in {**case.inputs, **case.labels}.items()}
            losses.append(case.architecture.stock_step(stock, batch)[1])
            if row == data_parallel_rank:
                ours(**batch).loss.backward()
        torch.stack(losses).mean().backward()
    assert_all_agree("gradient", trainable_gradients(ours), trainable_gradients(stock))


@pytest.mark.parametrize("targets", ["all-linear", None])
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_targets_that_peft_chooses_are_the_same(case: Case, targets: str | None) -> None:
    """Catches layers left out because they are no nn.Linear, and heads that peft leaves alone."""
    case = replace(case, lora={**case.lora, "target_modules": targets})
    chosen = set(our_model(case).targeted_module_names)
    if targets is None and case.head == "ForSequenceClassification":  # peft knows no defaults for this stock class
        assert chosen == {name for name in chosen if name.endswith(("query", "value"))}  # as for BERT
    else:
        assert chosen == set(stock_model(case).targeted_module_names)


@on_live_ranks(2)
def test_adapters_of_a_half_precision_model_are_float32(gpt2: Case) -> None:
    """Catches a cast that loses the cut or stays half precise, in which small steps vanish."""
    case = replace(gpt2, dtype=torch.bfloat16)
    expected, model = logits(case, stock_model(case)), our_model(case.at(2))
    assert {parameter.dtype for parameter in trainable_weights(model).values()} == {torch.float32}
    # bfloat16 keeps 8 bits, and the sums over ranks are rounded once more.
    torch.testing.assert_close(logits(case, model), expected, rtol=0.1, atol=0.1 * float(expected.std()))


@on_live_ranks(2)
def test_a_second_adapter_is_cut_too(gpt2: Case) -> None:
    """Catches an adapter added later that goes past this package, and one that is mixed up with the first."""
    case = gpt2.at(2)
    model = our_model(case)
    first, base = logits(case, model), logits(case, our_base(case))
    model.add_adapter("second", replace(case, lora={**case.lora, "r": 2}).config)
    assert_agrees("the first adapter's logits", logits(case, model), first)
    model.set_adapter("second")
    assert float((logits(case, model) - first).abs().max()) > 0.01
    with model.disable_adapter():
        assert_agrees("the base model's logits", logits(case, model), base)
    model.set_adapter("default")
    assert_agrees("the first adapter's logits again", logits(case, model), first)
