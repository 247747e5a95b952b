"""The vocabulary: sizes that no degree divides, the decoder's bias, the padding token's row, and other sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from hf_megatron import MegatronBertConfig, MegatronBertForMaskedLM, MegatronBertForPreTraining, MegatronBertModel
from hf_megatron.errors import UnsupportedError
from hf_megatron.partition import chunk_range
from hf_megatron_conversion import convert, verify
from tests.models.bert.reference import (
    LAST_TOKEN,
    MASKED_LM_HEADS,
    PLACEMENTS,
    TINY,
    BertDir,
    make_inputs,
    make_labels,
    our_class,
    save_stock_bert,
    stock_class,
)
from tests.models.reference import (
    Pool,
    assert_agrees,
    assert_all_agree,
    assert_all_equal,
    full,
    full_weights,
    layout,
    rank,
    run_at,
)
from tests.tiers import quick

BIAS, EMBEDDING = "cls.predictions.bias", "bert.embeddings.word_embeddings.weight"


def _take_a_step(placement: str, stock_directory: Path, directory: Path, tp_size: int) -> None:
    """One AdamW step beside the stock model, then both kinds of save."""
    stock = stock_class(placement, "ForPreTraining").from_pretrained(stock_directory, dtype=torch.float64).train()
    ours = MegatronBertForPreTraining.from_pretrained(
        stock_directory, dtype=torch.float64, distributed_config=layout(tp_size)
    ).train()
    vocab_size = ours.config.vocab_size
    inputs, labels = (make("ForPreTraining", vocab_size=vocab_size) for make in (make_inputs, make_labels))
    for model in (stock, ours):
        # Adam divides by the gradient's size: where that is rounding noise (the keys' bias), so would the step be.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
        model(**inputs, **labels).loss.backward()
        optimizer.step()
    weights, expected = full_weights(ours), full_weights(stock)
    assert_all_agree("weight", weights, expected)
    for name in (BIAS, EMBEDDING):
        size = weights[name].shape[0]
        parameter = ours.get_parameter(name)
        held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        start, stop = chunk_range(size, tp_size, rank())
        assert (size, held.shape[0]) == (vocab_size, stop - start)
        assert torch.equal(held, weights[name][start:stop])
    ours.save_pretrained(directory / "hub")
    ours.save_pretrained(directory / "tp", distributed_checkpoint=True)


def _load(directory: Path, tp_size: int) -> dict[str, torch.Tensor]:
    model, info = MegatronBertForPreTraining.from_pretrained(
        directory, distributed_config=layout(tp_size), output_loading_info=True
    )
    assert not any(info.values()), info
    return full_weights(model)


@pytest.mark.parametrize(("placement", "vocab_size"), [("post", 30522), ("pre", 28996)])
def test_published_sizes_survive_everything(pool: Pool, tmp_path: Path, placement: str, vocab_size: int) -> None:
    """Catches a padded or shortened vocabulary, or a bias cut otherwise than its decoder, on any of the ways.

    A step of the optimizer, both kinds of save, loading at another degree, and conversion there and back.
    """
    stock = save_stock_bert(
        tmp_path / "stock", placement, "ForPreTraining", vocab_size=vocab_size, hidden_size=24, num_hidden_layers=1
    )
    run_at(pool, 4, _take_a_step, placement, stock, tmp_path, 4)
    saved = load_file(tmp_path / "hub" / "model.safetensors")
    original = load_file(stock / "model.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in original.items()}
    assert saved[BIAS].shape == (vocab_size,)
    assert not torch.equal(saved[BIAS], original[BIAS].double())
    for directory, tp_size in ((tmp_path / "hub", 1), (tmp_path / "tp", 1), (tmp_path / "tp", 2)):
        for weights in run_at(pool, tp_size, _load, directory, tp_size):
            assert_all_equal(weights, saved)

    convert(tmp_path / "hub", tmp_path / "tp4", to="tp", tp_size=4)
    assert verify(tmp_path / "tp4", tmp_path / "tp").equal
    convert(tmp_path / "tp", tmp_path / "tp3", to="tp", tp_size=3)
    convert(tmp_path / "tp3", tmp_path / "again", to="hub")
    assert_all_equal(load_file(tmp_path / "again" / "model.safetensors"), saved)
    model, info = stock_class(placement, "ForPreTraining").from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(model.cls.predictions.decoder.bias, saved[BIAS])


# ---------------------------------------------------------------- the padding token


def _padding_gradient(padding: int, directory: Path, tp_size: int) -> None:
    model = MegatronBertModel.from_pretrained(directory, distributed_config=layout(tp_size), dtype=torch.float64)
    assert model.embeddings.word_embeddings.padding_idx == padding
    # The padding is attended to, so that its row would get a gradient.
    inputs = make_inputs("Model", pad_token_id=padding)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    model.train()(**inputs).last_hidden_state.square().sum().backward()
    weight = model.embeddings.word_embeddings.weight
    assert weight.grad is not None
    gradient = full(weight.grad)
    looked_up = inputs["input_ids"].unique()
    has_gradient = torch.zeros(131, dtype=torch.bool)
    has_gradient[looked_up[looked_up != padding]] = True
    assert torch.equal(gradient.abs().sum(dim=1) > 0, has_gradient)


@pytest.mark.parametrize(
    ("padding", "variant", "tp_size"),
    quick(
        ((*at, tp_size) for at in ((0, "base"), (LAST_TOKEN, "padding_at_the_end")) for tp_size in (1, 2, 4)),
        [(0, "base", 1), (LAST_TOKEN, "padding_at_the_end", 2)],
    ),
)
def test_the_padding_row_is_not_trained(
    pool: Pool, bert_dir: BertDir, padding: int, variant: str, tp_size: int
) -> None:
    """Catches the row of this number frozen on every rank, and the row of another rank's token in its place."""
    run_at(pool, tp_size, _padding_gradient, padding, bert_dir("post", "Model", variant), tp_size)


def _rows_of_zeros(padding: int | None, tp_size: int) -> list[int]:
    config = MegatronBertConfig(**{**TINY, "pad_token_id": padding})
    model = MegatronBertModel.from_config(config, distributed_config=layout(tp_size), seed=0)
    rows: torch.Tensor = (full(model.embeddings.word_embeddings.weight) == 0).all(dim=1).nonzero()
    return rows.flatten().tolist()


@pytest.mark.parametrize("tp_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("padding", [0, 70, LAST_TOKEN, None])
def test_the_padding_row_begins_as_zeros(pool: Pool, padding: int | None, tp_size: int) -> None:
    """Catches a padding row that is drawn like the others, or the same row of every rank's shard set to zero."""
    expected = [] if padding is None else [padding]
    assert run_at(pool, tp_size, _rows_of_zeros, padding, tp_size) == [expected] * tp_size


# ---------------------------------------------------------------- another size


@pytest.mark.parametrize("options", [{"new_num_tokens": 140}, {"new_num_tokens": 100}, {"pad_to_multiple_of": 64}])
@pytest.mark.parametrize("head", MASKED_LM_HEADS)
@pytest.mark.parametrize("variant", ["base", "untied"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_resizing_in_one_process(
    bert_dir: BertDir, tmp_path: Path, placement: str, variant: str, head: str, options: dict[str, int]
) -> None:
    """Catches a decoder or a bias that keeps the old size, and new rows that are not those of stock."""
    resized = []
    for model_class in (stock_class(placement, head), our_class(head)):
        model = model_class.from_pretrained(bert_dir(placement, head, variant))
        torch.manual_seed(3)
        model.resize_token_embeddings(**options)
        resized.append(model.eval())
    stock, ours = resized
    assert ours.config.vocab_size == stock.config.vocab_size
    inputs = make_inputs(head, vocab_size=99)
    for mine, theirs in zip(ours(**inputs).to_tuple(), stock(**inputs).to_tuple(), strict=True):
        assert_agrees("output", mine, theirs)
    ours.train()(**inputs, labels=inputs["input_ids"]).loss.backward()

    ours.save_pretrained(tmp_path)
    again, info = our_class(head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_all_equal(full_weights(again), full_weights(ours))


def test_resizing_without_the_mean(bert_dir: BertDir) -> None:
    """Catches new rows that are left as memory was, and a bias for them where there should be none."""
    for variant in ("base", "untied"):
        model = MegatronBertForMaskedLM.from_pretrained(bert_dir("post", "ForMaskedLM", variant))
        before = full_weights(model)
        model.resize_token_embeddings(500, mean_resizing=False)
        after = full_weights(model)
        for name in before.keys() & {EMBEDDING, BIAS, "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}:
            assert torch.equal(after[name][:131], before[name])
            new = after[name][131:]
            if name.endswith("bias"):
                assert new.shape == (369,)
                assert not new.any()
            else:
                assert new.std().item() == pytest.approx(0.02, rel=0.1)


def _expect_refused_resizing(directory: Path) -> None:
    model = MegatronBertForMaskedLM.from_pretrained(directory, distributed_config=layout(2))
    before = full_weights(model)
    with pytest.raises(UnsupportedError, match=r"resize_token_embeddings .* 2 ranks. Load in one process"):
        model.resize_token_embeddings(140)
    assert model.config.vocab_size == 131
    assert_all_equal(full_weights(model), before)


def test_resizing_over_several_ranks(pool: Pool, bert_dir: BertDir) -> None:
    """Catches rows added to one rank's shard, or a bias resized before the embedding is refused."""
    pool(2).run(_expect_refused_resizing, bert_dir("post", "ForMaskedLM"))
