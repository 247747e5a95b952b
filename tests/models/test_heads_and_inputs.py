"""The other heads, the base model, and everything a caller can pass besides token ids: the same as stock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
)

from hf_megatron import (
    MegatronGPT2ForQuestionAnswering,
    MegatronGPT2ForSequenceClassification,
    MegatronGPT2ForTokenClassification,
    MegatronGPT2LMHeadModel,
    MegatronGPT2Model,
)
from hf_megatron.models.arguments import CACHE
from tests.models.reference import (
    Pool,
    assert_agrees,
    assert_all_agree,
    full_gradients,
    layout,
    make_batch,
    run_at,
    save_stock,
    token_ids,
)
from tests.tiers import quick

StockDir = Callable[[str], Path]
Pair = tuple[PreTrainedModel, PreTrainedModel]

LAYOUTS = [(1, False), (2, False), (4, False), (2, True), (4, True)]  # tp_size, and sequence parallelism

HEADS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel], dict[str, torch.Tensor]]] = {
    "base": (GPT2Model, MegatronGPT2Model, {}),
    "sequence": (
        GPT2ForSequenceClassification,
        MegatronGPT2ForSequenceClassification,
        {"labels": torch.tensor([0, 2, 1])},
    ),
    "token": (
        GPT2ForTokenClassification,
        MegatronGPT2ForTokenClassification,
        {"labels": token_ids(vocab_size=3).masked_fill(make_batch("right")["attention_mask"] == 0, -100)},
    ),
    "question": (
        GPT2ForQuestionAnswering,
        MegatronGPT2ForQuestionAnswering,
        {"start_positions": torch.tensor([1, 0, 2]), "end_positions": torch.tensor([3, 2, 3])},
    ),
}


def _load_pair(
    stock: type[PreTrainedModel], ours: type[PreTrainedModel], directory: Path, tp_size: int, sequence_parallel: bool
) -> Pair:
    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    split = layout(tp_size, sequence_parallel=sequence_parallel)
    return stock.from_pretrained(directory, **options), ours.from_pretrained(
        directory, distributed_config=split, **options
    )


def _assert_outputs_agree(actual: Any, expected: Any, valid: torch.Tensor) -> None:
    """Every field, at the positions [B, S] that are not padding."""
    names = [name for name in expected if name != "cross_attentions"]  # always empty where there are none
    assert list(actual) == names, f"fields {list(actual)}, expected {names}"
    for name in names:
        if name in ("attentions", "hidden_states"):
            assert len(actual[name]) == len(expected[name]), name
            for i, (mine, theirs) in enumerate(zip(actual[name], expected[name], strict=True)):
                by_position = [x.movedim(2, 1) if name == "attentions" else x for x in (mine, theirs)]
                assert_agrees(f"{name}[{i}]", *(x[valid] for x in by_position))
        elif name != CACHE:
            is_per_token = expected[name].shape[:2] == valid.shape
            assert_agrees(name, *(x[valid] if is_per_token else x for x in (actual[name], expected[name])))


def _compare_head(head: str, directory: Path, tp_size: int, sequence_parallel: bool) -> None:
    stock_class, our_class, labels = HEADS[head]
    stock, ours = _load_pair(stock_class, our_class, directory, tp_size, sequence_parallel)
    batch = make_batch("right")
    valid = batch["attention_mask"].bool()
    inputs = {**batch, **labels, "output_attentions": True, "output_hidden_states": True}
    if head in ("base", "question"):
        del inputs["labels"]

    expected, actual = stock(**inputs), ours(**inputs)
    _assert_outputs_agree(actual, expected, valid)
    for outputs in (expected, actual):
        loss = outputs.last_hidden_state[valid].square().mean() if head == "base" else outputs.loss
        # Whoever looks at hidden states and attentions may train on them.
        (
            loss + sum(x[valid].square().mean() for x in outputs.hidden_states) + outputs.attentions[0][0].max()
        ).backward()
    assert_all_agree("gradient", full_gradients(ours), full_gradients(stock))

    # A first part that fills the cache, then two tokens at once, then one.
    caches = [DynamicCache(config=model.config) for model in (stock, ours)]
    for part in batch["input_ids"].split([6, 2, 1], dim=1):
        expected_step, step = (
            model(part, **{CACHE: cache}, use_cache=True) for model, cache in zip((stock, ours), caches, strict=True)
        )
        _assert_outputs_agree(step, expected_step, torch.ones_like(part).bool())

    attentions = ours(**inputs, return_dict=False, use_cache=False)[-1]
    for mine, theirs in zip(attentions, expected.attentions, strict=True):
        assert_agrees("attentions in a tuple", mine.movedim(2, 1)[valid], theirs.movedim(2, 1)[valid])


@pytest.mark.parametrize(
    ("head", "tp_size", "sequence_parallel"),
    quick(
        ((head, *at) for head in HEADS for at in LAYOUTS),
        [("base", 4, False), *((head, 2, i % 2 == 0) for i, head in enumerate(HEADS))],
    ),
)
def test_heads_equal_stock(pool: Pool, tmp_path: Path, head: str, tp_size: int, sequence_parallel: bool) -> None:
    """Catches a head that is cut or reduced twice, and attentions or hidden states of this rank's part only."""
    save_stock(tmp_path, HEADS[head][0], num_labels=3, classifier_dropout=0.0)
    run_at(pool, tp_size, _compare_head, head, tmp_path, tp_size, sequence_parallel)


def _compare_inputs(directory: Path, tp_size: int, sequence_parallel: bool) -> None:
    stock, ours = _load_pair(GPT2LMHeadModel, MegatronGPT2LMHeadModel, directory, tp_size, sequence_parallel)
    ids = token_ids()
    everywhere = torch.ones_like(ids).bool()
    embeddings = torch.randn(3, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    visible = torch.ones(9, 9).tril().bool()[None, None].expand(3, 1, 9, 9)
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    cases: list[dict[str, Any]] = [
        {"input_ids": ids, "token_type_ids": token_ids(seed=4)},
        {"input_ids": ids, "position_ids": (torch.arange(9) * 3).expand(3, 9)},
        {"inputs_embeds": embeddings},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "logits_to_keep": 2},
        {"input_ids": ids, "logits_to_keep": torch.tensor([0, 5])},
        {"input_ids": ids, "labels": ids, "ignore_index": 7},
    ]
    for inputs in cases:
        expected, actual = stock(**inputs, use_cache=False), ours(**inputs, use_cache=False)
        if expected.loss is not None:
            torch.testing.assert_close(actual.loss.float(), expected.loss)  # stock's is always float32
            expected.loss = actual.loss
        _assert_outputs_agree(actual, expected, everywhere)

    # A first part that fills the cache, then two tokens at once, then one.
    caches: list[Any] = [None, None]
    for part in (ids[:, :6], ids[:, 6:8], ids[:, 8:]):
        expected, actual = (
            model(part, **{CACHE: cache}, use_cache=True) for model, cache in zip((stock, ours), caches, strict=True)
        )
        assert_agrees("logits with a cache", actual.logits, expected.logits)
        caches = [expected[CACHE], actual[CACHE]]


@pytest.mark.parametrize(("tp_size", "sequence_parallel"), quick(LAYOUTS, [(1, False), (2, False), (2, True)]))
def test_inputs_equal_stock(pool: Pool, stock_dir: StockDir, tp_size: int, sequence_parallel: bool) -> None:
    """Catches arguments that are dropped on the way, and a cache whose length or mask a rank gets wrong."""
    run_at(pool, tp_size, _compare_inputs, stock_dir("base"), tp_size, sequence_parallel)


def _share_of_equal_probabilities(ours: bool, upcast: bool, directory: Path) -> float:
    """How much of the first layer's bfloat16 attention is what stock computes with upcasting."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    stock = GPT2LMHeadModel.from_pretrained(directory, **options)
    model_class = MegatronGPT2LMHeadModel if ours else GPT2LMHeadModel
    model = model_class.from_pretrained(directory, reorder_and_upcast_attn=upcast, **options)
    first, second = (m(token_ids(), output_attentions=True).attentions[0] for m in (stock, model))
    return float((first == second).float().mean())


def test_upcasting_is_done(stock_dir: StockDir) -> None:
    """Catches `reorder_and_upcast_attn` accepted and ignored, which only shows in half precision."""
    directory = stock_dir("upcast")
    without = _share_of_equal_probabilities(ours=False, upcast=False, directory=directory)
    assert _share_of_equal_probabilities(ours=True, upcast=True, directory=directory) > 0.99 > without
