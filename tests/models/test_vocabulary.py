"""The vocabulary: sizes that no degree divides, the decoder's bias, the padding token's row, and other sizes."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_megatron.errors import UnsupportedError
from hf_megatron.partition import chunk_range
from hf_megatron_conversion import convert, verify
from tests.live import on_live_ranks
from tests.models.architectures import ARCHITECTURES, GPT2, POST, PRE, ModelCase, StockDir, V
from tests.models.reference import (
    Pool,
    Tensors,
    assert_agrees,
    assert_all_agree,
    assert_all_equal,
    full,
    full_weights,
    rank,
    run_at,
)
from tests.tiers import cases


def _vocabulary(case: ModelCase, weights: Tensors) -> list[str]:
    """Every tensor with a row for each token."""
    names = {case.embedding, *case.tied, *case.tied.values()}
    return [name for name in weights if name in names]


def _take_a_step(case: ModelCase, stock_directory: Path, directory: Path, tp_size: int) -> None:
    """One AdamW step beside the stock model, then both kinds of save."""
    stock = case.load_stock(stock_directory, dtype=torch.float64)
    ours = case.load(stock_directory, tp_size, dtype=torch.float64, attn_implementation="eager").train()
    vocab_size = ours.config.vocab_size
    batch = case.batch(vocab_size=vocab_size)
    for model, loss in ((stock, case.stock_step(stock, batch)[1]), (ours, ours(**batch).loss)):
        # Adam divides by the gradient's size: where that is rounding noise (the keys' bias), so would the step be.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
        loss.backward()
        optimizer.step()
    weights, expected = full_weights(ours), full_weights(stock)
    assert_all_agree("weight", weights, expected)
    for name in _vocabulary(case, weights):
        assert weights[name].shape[0] == vocab_size
        start, stop = chunk_range(vocab_size, tp_size, rank())
        assert torch.equal(ours.get_parameter(name).to_local(), weights[name][start:stop])
    ours.save_pretrained(directory / "hub")
    ours.save_pretrained(directory / "tp", distributed_checkpoint=True)


def _load(case: ModelCase, directory: Path, tp_size: int) -> Tensors:
    model, info = case.load(directory, tp_size, output_loading_info=True)
    assert not any(info.values()), info
    return full_weights(model)


@pytest.mark.parametrize(("case", "vocab_size"), [(GPT2, 50257), (POST, 30522), (PRE, 28996)])
def test_published_sizes_survive_everything(pool: Pool, tmp_path: Path, case: ModelCase, vocab_size: int) -> None:
    """Catches a padded or shortened vocabulary in training, saving, loading at another degree, and conversion."""
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "hidden_size": 24, "num_hidden_layers": 1}
    stock = case.save_stock(tmp_path / "stock", **sizes)
    pool(4).run(_take_a_step, case, stock, tmp_path, 4)
    saved = load_file(tmp_path / "hub" / "model.safetensors")
    original = load_file(stock / "model.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in original.items()}
    for name in _vocabulary(case, saved):
        assert saved[name].shape[0] == vocab_size
        assert not torch.equal(saved[name], original[name].double())
    for directory, tp_size in ((tmp_path / "hub", 1), (tmp_path / "tp", 1), (tmp_path / "tp", 2)):
        for weights in run_at(pool, tp_size, _load, case, directory, tp_size):
            assert_all_equal(weights, saved)

    convert(tmp_path / "hub", tmp_path / "tp4", to="tp", tp_size=4)
    assert verify(tmp_path / "tp4", tmp_path / "tp").equal
    convert(tmp_path / "tp", tmp_path / "tp3", to="tp", tp_size=3)
    convert(tmp_path / "tp3", tmp_path / "again", to="hub")
    assert_all_equal(load_file(tmp_path / "again" / "model.safetensors"), saved)
    model, info = case.stock().from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    for name, other in case.tied.items():
        assert torch.equal(model.get_parameter(name), saved[other])


@cases(
    "padding, tp_size",
    itertools.product((0, 70, V - 1, None), (1, 2, 4)),
    [(0, 1), (0, 2), (70, 2), (V - 1, 2), (None, 1)],
)
@on_live_ranks()
def test_the_padding_row_is_not_trained(padding: int | None, tp_size: int) -> None:
    """Catches a padding row that is drawn, or learns, and the same row of every rank's shard in its place."""
    model = PRE.build(tp_size, head="Model", config=PRE.config(pad_token_id=padding), seed=0)
    weight = model.embeddings.word_embeddings.weight
    expected = [] if padding is None else [padding]
    assert (full(weight) == 0).all(dim=1).nonzero().flatten().tolist() == expected
    parts = torch.arange(V)[None].split(32, dim=1)  # every token once
    losses = [model.train()(part).last_hidden_state.pow(3).sum() for part in parts]
    torch.stack(losses).sum().backward()
    assert (full(weight.grad) == 0).all(dim=1).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("options", [{"new_num_tokens": 140}, {"new_num_tokens": 100}, {"pad_to_multiple_of": 64}])
@pytest.mark.parametrize("variant", ["base", "untied"])
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_resizing(stock_dir: StockDir, tmp_path: Path, case: ModelCase, variant: str, options: dict[str, int]) -> None:
    """Catches a head, a decoder or a bias that keeps the old size, and new rows that are not those of stock."""
    for head in dict.fromkeys((case.heads[0], case.language_model)):
        resized = []
        for load in (case.stock(head).from_pretrained, case.ours(head).from_pretrained):
            model = load(stock_dir(case, head, variant))
            torch.manual_seed(3)
            model.resize_token_embeddings(**options)
            resized.append(model.eval())
        stock, ours = resized
        assert ours.config.vocab_size == stock.config.vocab_size
        names = ours.state_dict().keys() - case.unused(is_tied=variant == "base")
        assert_all_equal(*({name: model.state_dict()[name] for name in names} for model in (ours, stock)))
        inputs = case.inputs(head, vocab_size=99)
        assert_agrees("logits", ours(**inputs)[0], stock(**inputs)[0])
        ours.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        ours.save_pretrained(tmp_path / head)
        again, info = case.load(tmp_path / head, head=head, output_loading_info=True)
        assert not any(info.values()), info
        assert_all_equal(full_weights(again), full_weights(ours))


@pytest.mark.parametrize("variant", ["base", "untied"])
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_resizing_without_the_mean(stock_dir: StockDir, case: ModelCase, variant: str) -> None:
    """Catches new rows that are left as memory was, and a bias for them where there should be none."""
    model = case.load(stock_dir(case, None, variant))
    before = full_weights(model)
    model.resize_token_embeddings(500, mean_resizing=False)
    after = full_weights(model)
    for name in _vocabulary(case, before):
        assert torch.equal(after[name][:V], before[name])
        new = after[name][V:]
        assert new.shape[0] == 500 - V
        if name.endswith("bias"):
            assert not new.any()
        else:
            assert new.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("case", ARCHITECTURES)
@on_live_ranks(2)
def test_resizing_over_several_ranks(stock_dir: StockDir, case: ModelCase) -> None:
    """Catches rows added to one rank's shard, or a bias resized before the embedding is refused."""
    model = case.load(stock_dir(case), 2)
    before = full_weights(model)
    with pytest.raises(UnsupportedError, match=r"resize_token_embeddings .* 2 ranks. Load in one process"):
        model.resize_token_embeddings(140)
    assert model.config.vocab_size == V
    assert_all_equal(full_weights(model), before)
