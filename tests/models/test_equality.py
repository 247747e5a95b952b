"""The numbers of the stock classes, for every head and layout: outputs, loss, every gradient, and the next weights."""

import inspect
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import DynamicCache

from hf_megatron.models.forward_arguments import CACHE
from tests.live import on_live_ranks
from tests.models.architectures import ARCHITECTURES, BERTS, GPT2, POST, PRE, ModelCase, StockDir, positions, token_ids
from tests.models.reference import (
    Pool,
    assert_agrees,
    assert_all_agree,
    assert_outputs_agree,
    assert_replicas_equal,
    assert_same_on_all_ranks,
    full_weights,
    gradients,
    loss_of,
    reference_loss,
    run_at,
)
from tests.tiers import cases

Kernel = tuple[torch.dtype, str]  # dtype and attention implementation


class Layout(NamedTuple):
    """How many ranks, and whether they split sequences between the layers."""

    tp_size: int
    splits: bool = False

    @property
    def __name__(self) -> str:
        return f"tp{self.tp_size}{'-split' if self.splits else ''}"


LAYOUTS = [Layout(1), Layout(2), Layout(4), Layout(2, True), Layout(4, True)]
KERNELS: list[Kernel] = [(torch.float64, "eager"), (torch.float64, "sdpa"), (torch.float32, "sdpa")]
# Over 4 ranks 8 positions are 2 each, 9 are 3, 3, 3 and none, and 5 are 2, 2, 1 and none. 3 are not split over 4.
LENGTHS = (8, 9, 5, 3)


def _options(at: Layout, kernel: Kernel) -> dict[str, Any]:
    return {"tp_size": at.tp_size, "sequence_parallel": at.splits, "dtype": kernel[0], "attn_implementation": kernel[1]}


def _compare(case: ModelCase, head: str, directory: Path, at: Layout, kernels: list[Kernel], **grid: Any) -> None:
    """An evaluation and a step of AdamW for each combination of kernels with ``paddings`` and ``lengths``.

    In float64 all of them are on the same weights as they develop; float32 would add up the rounding of all steps.
    """
    for kernel in kernels:
        stock: Any = None
        for padding, length in itertools.product(grid.get("paddings", ("right",)), grid.get("lengths", (9,))):
            if stock is None or kernel[0] == torch.float32:
                stock = case.load_stock(directory, head, dtype=kernel[0], attention=kernel[1])
                ours = case.load(directory, head=head, **_options(at, kernel))
                # Adam divides by the gradient's size, which of a key's bias is rounding noise; so would be the step.
                adam: dict[str, Any] = {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1}
                optimizers = [torch.optim.AdamW(model.parameters(), **adam) for model in (stock, ours)]
            _compare_step(case, head, stock, ours, padding, length, f"{kernel}, padding {padding}, length {length}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            # What Adam makes of a classifier's bias, whose gradient nearly cancels, is not sure to 1e-5 in float32.
            if kernel[0] == torch.float64 or head == "LMHeadModel":
                assert_all_agree(f"{kernel}: weight", full_weights(ours), full_weights(stock))
        assert_replicas_equal(ours)


def _compare_step(case: ModelCase, head: str, stock: Any, ours: Any, padding: str, length: int, context: str) -> None:
    config = ours.config
    batch = case.batch(head, padding, length, vocab_size=config.vocab_size, pad_token_id=config.pad_token_id)
    valid = positions(batch)
    # Kernels other than eager do not keep the probabilities.
    is_eager = config._attn_implementation == "eager"
    extras = {"output_hidden_states": True, "output_attentions": is_eager}
    expected, loss = case.stock_step(stock, batch, **extras)
    with torch.no_grad():
        outputs = ours.eval()(**batch, **extras)
    assert_agrees(f"{context}: loss in evaluation", loss_of(outputs, valid), loss)
    assert_outputs_agree(context, outputs, expected, valid)
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            assert_same_on_all_ranks(f"{context}: {name}", value)

    outputs = ours.train()(**batch, **(extras if is_eager else {}))
    if head in (case.heads[0], case.language_model):
        assert not {"logits", "prediction_logits"} & outputs.keys(), "training computes logits nobody asked for"
    trained = loss_of(outputs, valid)
    assert_agrees(f"{context}: loss", trained, loss)
    totals = [loss, trained]
    if is_eager:  # whoever looks at hidden states and attentions may train on them
        for i, given in enumerate((expected, outputs)):
            totals[i] = totals[i] + sum(x[valid].square().mean() for x in given.hidden_states)
            totals[i] = totals[i] + given.attentions[0][0].max()
    for total in totals:
        total.backward()
    assert_all_agree(f"{context}: gradient", gradients(ours), gradients(stock))


_HEADS = [(case, head) for case in ARCHITECTURES for head in case.heads]
_QUICK_HEADS = [
    *((*head, Layout(2)) for head in _HEADS if head[0] is not PRE),
    *((case, case.heads[0], at) for case in (GPT2, PRE) for at in (Layout(1), Layout(4, True))),
    *((case, "Model", Layout(4)) for case in BERTS),
    *((PRE, head, Layout(2, True)) for head in ("ForMaskedLM", "ForMultipleChoice", "ForSequenceClassification")),
    (GPT2, "ForQuestionAnswering", Layout(2, True)),
]


@cases("case, head, at", ((*head, at) for head in _HEADS for at in LAYOUTS), _QUICK_HEADS)
def test_heads_equal_stock(pool: Pool, stock_dir: StockDir, case: ModelCase, head: str, at: Layout) -> None:
    """Catches a wrong cut, a reduction missing or done twice, a misplaced norm, and outputs of one rank's part only."""
    kernels = KERNELS if at.tp_size < 4 else KERNELS[:2]
    lengths = LENGTHS if at.splits and head == case.heads[0] else (9,)
    run_at(pool, at.tp_size, _compare, case, head, stock_dir(case, head), at, kernels, lengths=lengths)


_VARIANTS = [(case, variant) for case in ARCHITECTURES for variant in case.variants if variant != "base"]


@cases(
    "case, variant, at",
    (
        (*variant, at)
        for variant in _VARIANTS
        for at in (*LAYOUTS, Layout(3))
        if not (at.splits and variant[1] == "chunked")  # is refused
    ),
    [
        *((*variant, Layout(2)) for variant in _VARIANTS),
        *((case, "untied", Layout(2, True)) for case in ARCHITECTURES),
        (GPT2, "uneven_n_inner", Layout(4)),
    ],
)
def test_variants_equal_stock(pool: Pool, stock_dir: StockDir, case: ModelCase, variant: str, at: Layout) -> None:
    """Catches an entry of the configuration that is ignored, and cuts that only work for sizes that divide."""
    kernels = KERNELS[1:]
    if variant == "upcast":  # concerns eager attention alone, where stock raises for float64
        kernels = [(torch.float32, "eager"), (torch.float64, "sdpa")]
    directory = stock_dir(case, None, variant)
    run_at(pool, at.tp_size, _compare, case, case.heads[0], directory, at, kernels)


_DEGREES = [(25, 100, tp_size) for tp_size in (2, 3, 4, 8)] + [(12, 48, tp_size) for tp_size in (5, 7, 8)]


@cases(
    "case, heads, hidden, tp_size",
    ((case, *degree) for case in ARCHITECTURES for degree in (*_DEGREES, (3, 48, 2))),
    [(GPT2, 25, 100, 3), (PRE, 12, 48, 5), (POST, 3, 48, 2)],
)
def test_any_number_of_heads(
    pool: Pool, tmp_path: Path, case: ModelCase, heads: int, hidden: int, tp_size: int
) -> None:
    """Catches a head on two ranks of which columns are missing, in the wrong place or counted twice in a gradient."""
    case.save_stock(tmp_path, num_attention_heads=heads, hidden_size=hidden)
    for splits in (False, True):
        job = (_compare, case, case.heads[0], tmp_path, Layout(tp_size, splits), [KERNELS[splits], KERNELS[2]])
        run_at(pool, tp_size, *job, timeout=250)


@pytest.mark.slow
@pytest.mark.parametrize("at", [Layout(2), Layout(3, True), Layout(4), Layout(4, True)])
@pytest.mark.parametrize(("case", "head"), _HEADS)
def test_everything_equals_stock(pool: Pool, stock_dir: StockDir, case: ModelCase, head: str, at: Layout) -> None:
    """Catches what only one combination of head, dtype, kernel, padding and length gets wrong."""
    every_remainder = (9, 8, 7, 6)  # at every degree
    for kernel in [*KERNELS, (torch.float32, "eager")]:
        paddings, lengths = (("none", "left"), every_remainder) if kernel == KERNELS[1] else (("left",), (9, 7))
        job = (_compare, case, head, stock_dir(case, head), at, [kernel])
        run_at(pool, at.tp_size, *job, paddings=paddings, lengths=lengths, timeout=250)


SHIFTED = token_ids(seed=5)
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "accumulated": {"num_items_in_batch": torch.tensor(40)},
    "smoothed and accumulated": {"label_smoothing": 0.3, "num_items_in_batch": 40},
    "shifted by the caller": {"shift_labels": SHIFTED},
}


@cases(
    "case, tp_size, padding",
    itertools.product(ARCHITECTURES, (1, 2, 4), ("none", "right", "left")),
    [(GPT2, 4, "left"), (GPT2, 2, "none"), (PRE, 2, "right"), (POST, 1, "none")],
)
@on_live_ranks()
def test_losses_equal_stock(stock_dir: StockDir, case: ModelCase, tp_size: int, padding: str) -> None:
    """Catches an option dropped on the way, ignored labels that count, and a mean over the wrong number of tokens."""
    head = case.language_model
    stock = case.load_stock(stock_dir(case, head), head, dtype=torch.float64, attention="sdpa")
    ours = case.load(stock_dir(case, head), tp_size, head, dtype=torch.float64)
    inputs, labels = case.inputs(head, padding), case.labels(head, padding)["labels"]
    logits = stock(**inputs).logits
    unused = next(token for token in range(131) if token not in {*labels.unique().tolist(), *SHIFTED.unique().tolist()})
    for name, options in LOSSES.items():
        if "shift_labels" in options and not case.is_causal:
            continue
        stock.zero_grad()
        expected = reference_loss(
            logits, labels, **(options if case.is_causal else {"shift_labels": labels, **options})
        )
        expected.backward(retain_graph=True)
        for ignored in (-100, unused):
            ours.train().zero_grad()
            given = {"labels": labels.masked_fill(labels == -100, ignored), "ignore_index": ignored, **options}
            loss = ours(**inputs, **given).loss
            loss.backward()
            assert_agrees(f"{name}: loss", loss, expected)
            assert_all_agree(f"{name}: gradient", gradients(ours), gradients(stock))
            with torch.no_grad():
                assert_agrees(f"{name}: in evaluation", ours.eval()(**inputs, **given).loss, expected)


@cases(
    "case, at",
    itertools.product(ARCHITECTURES, LAYOUTS),
    [*itertools.product(ARCHITECTURES, LAYOUTS[1:4:2]), (GPT2, Layout(1))],
)
@on_live_ranks()
def test_inputs_equal_stock(stock_dir: StockDir, case: ModelCase, at: Layout) -> None:
    """Catches arguments that are dropped on the way, and token types or positions that are made up wrongly."""
    head = case.language_model
    stock = case.load_stock(stock_dir(case, head), head, dtype=torch.float64)
    ours = case.load(stock_dir(case, head), head=head, **_options(at, KERNELS[0]))
    ids, padded = token_ids(), case.inputs(head)["attention_mask"].bool()
    everywhere = torch.ones_like(padded)
    embeddings = torch.randn(3, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    causal_mask = torch.full((3, 1, 9, 9), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    cases: list[tuple[dict[str, Any], torch.Tensor]] = [
        ({"input_ids": ids}, everywhere),
        ({"input_ids": ids, "token_type_ids": ids % (131 if case.is_causal else 2)}, everywhere),
        ({"input_ids": ids, "position_ids": (torch.arange(9) * 3).expand(3, 9)}, everywhere),
        ({"inputs_embeds": embeddings}, everywhere),
        ({"input_ids": ids, "attention_mask": causal_mask}, everywhere),
        ({"input_ids": ids, "attention_mask": padded}, padded),
    ]
    if case.is_causal:
        cases += [({"input_ids": ids, "logits_to_keep": keep}, everywhere) for keep in (2, torch.tensor([0, 5]))]
    for inputs, valid in cases:
        assert_outputs_agree(str(list(inputs)), ours(**inputs), stock(**inputs), valid)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(("case", "head"), _HEADS)
@on_live_ranks()
def test_calls_are_understood_as_by_stock(stock_dir: StockDir, case: ModelCase, head: str, tp_size: int) -> None:
    """Catches `model(ids, mask, types)` understood in another order, and a tuple with another order or more in it."""
    stock = case.load_stock(stock_dir(case, head), head, dtype=torch.float64).eval()
    ours = case.load(stock_dir(case, head), head=head, **_options(Layout(tp_size), KERNELS[0]))
    inputs, labels = case.inputs(head), case.labels(head)
    valid = positions(inputs)
    places = list(inspect.signature(stock.forward).parameters)
    places = places[: 1 + max(places.index(name) for name in inputs)]
    in_order = [inputs.get(name) for name in places]
    assert_outputs_agree("in order", ours(*in_order), stock(*in_order), valid)
    asked = {**inputs, **labels, "output_attentions": True, "use_cache": False}
    expected, answers = stock(**asked), ours(**asked, return_dict=False)
    names = [name for name in expected if name != "cross_attentions"]  # always empty where there are none
    named = type(expected)(**dict(zip(names, answers, strict=True)))
    assert_outputs_agree("tuple", named, expected, valid)


@cases(
    "head, at",
    itertools.product(GPT2.heads, LAYOUTS),
    [*((head, LAYOUTS[1 + 2 * (i % 2)]) for i, head in enumerate(GPT2.heads)), ("LMHeadModel", Layout(2, True))],
)
@on_live_ranks()
def test_cached_steps_equal_stock(stock_dir: StockDir, head: str, at: Layout) -> None:
    """Catches a cache, be it given or made, whose length, heads or mask a rank gets wrong."""
    stock = GPT2.load_stock(stock_dir(GPT2, head), head, dtype=torch.float64).eval()
    ours = GPT2.load(stock_dir(GPT2, head), head=head, **_options(at, KERNELS[0]))
    for is_given in (True, False):
        caches = [DynamicCache(config=model.config) if is_given else None for model in (stock, ours)]
        for part in token_ids().split([6, 2, 1], dim=1):
            expected, actual = (
                model(part, **{CACHE: cache}, use_cache=True, output_attentions=True)
                for model, cache in zip((stock, ours), caches, strict=True)
            )
            assert_outputs_agree("with a cache", actual, expected, torch.ones_like(part).bool())
            caches = [expected.get(CACHE, caches[0]), actual.get(CACHE, caches[1])]


def _share_of_equal_probabilities(is_ours: bool, upcast: bool, directory: Path) -> float:
    """How much of the first layer's bfloat16 attention is what stock computes with upcasting."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    stock, other = GPT2.stock(), GPT2.ours() if is_ours else GPT2.stock()
    models = [stock.from_pretrained(directory, **options)]
    models.append(other.from_pretrained(directory, reorder_and_upcast_attn=upcast, **options))
    first, second = (model(token_ids(), output_attentions=True).attentions[0] for model in models)
    return float((first == second).float().mean())


def test_upcasting_is_done(stock_dir: StockDir) -> None:
    """Catches `reorder_and_upcast_attn` accepted and ignored, which only shows in half precision."""
    directory = stock_dir(GPT2, None, "upcast")
    without = _share_of_equal_probabilities(is_ours=False, upcast=False, directory=directory)
    assert _share_of_equal_probabilities(is_ours=True, upcast=True, directory=directory) > 0.99 > without
