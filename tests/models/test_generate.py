"""Generation: the tokens of the stock model, and the same tokens on every rank."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, StaticCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hf_megatron.errors import HfMegatronError, UnsupportedError
from hf_megatron.models.forward_arguments import CACHE
from tests.live import on_live_ranks
from tests.models.architectures import GPT2, StockDir, make_batch, token_ids
from tests.models.reference import Pool, rank, run_at
from tests.tiers import cases


def _prompts(padding: str) -> dict[str, torch.Tensor]:
    if padding == "none":
        ids = token_ids(2, 4)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = make_batch(padding)
    del batch["labels"]
    return batch


@cases(
    "variant, attention, tp_size, splits",
    [
        *itertools.product(("base", "untied", "shared_heads"), ("sdpa", "eager"), (2, 4), (False, True)),
        ("base", "sdpa", 1, False),
    ],
    [
        ("base", "sdpa", 1, False),
        ("untied", "eager", 2, False),
        ("base", "sdpa", 2, True),
        ("shared_heads", "sdpa", 2, False),
    ],
)
@on_live_ranks()
def test_tokens_equal_stock(stock_dir: StockDir, variant: str, attention: str, tp_size: int, splits: bool) -> None:
    """Catches logits that are not whole, caches that hold the wrong heads, and padding that is attended to."""
    directory = stock_dir(GPT2, None, variant)
    stock = GPT2.load_stock(directory, dtype=torch.float64, attention=attention).eval()
    load: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": attention}
    ours = GPT2.load(directory, tp_size, sequence_parallel=splits, **load)
    for options in (
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ):
        for padding in ("none", "left") if options == {"do_sample": False} else ("left",):
            prompts = _prompts(padding)
            limits = {"max_new_tokens": 8, "min_new_tokens": 6}
            expected = stock.generate(**prompts, **limits, **options)
            actual = ours.generate(**prompts, **limits, **options)
            assert torch.equal(actual, expected), f"{options}, padding {padding}: {actual} instead of {expected}"


@pytest.mark.parametrize(("variant", "tp_size", "heads"), [("base", 1, 12), ("base", 2, 6), ("shared_heads", 2, 3)])
@on_live_ranks()
def test_static_cache_holds_this_ranks_heads(stock_dir: StockDir, variant: str, tp_size: int, heads: int) -> None:
    """Catches a preallocated cache sized for all heads on every rank, and a prompt in pieces that loses its place."""
    directory = stock_dir(GPT2, None, variant)
    stock = GPT2.load_stock(directory, dtype=torch.float64).eval()
    ours = GPT2.load(directory, tp_size, dtype=torch.float64)
    logits = []
    for model in (stock, ours):
        cache = StaticCache(config=model.config, max_cache_len=20)
        parts = [model(part, **{CACHE: cache}, use_cache=True).logits for part in token_ids(2, 9).split([5, 3, 1], 1)]
        logits.append(torch.cat(parts, dim=1))
    assert cache.layers[0].keys.shape[1] == heads
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-11)


def _sample(directory: Path, tp_size: int, *, stock: bool = False) -> list[list[list[int]]]:
    """Sampled ids of several calls, each begun from a different random state on every rank."""
    load = GPT2.load_stock if stock else partial(GPT2.load, tp_size=tp_size)
    model, sampled = load(directory, dtype=torch.float64).eval(), []
    options: dict[str, Any]
    for padding, options in (("none", {}), ("left", {"top_k": 20, "temperature": 1.5}), ("none", {"num_beams": 2})):
        torch.manual_seed(100 + rank())
        for _ in range(2):
            limits = {"max_new_tokens": 6, "min_new_tokens": 6}
            ids = model.generate(**_prompts(padding), **limits, **options, do_sample=True)
            sampled.append(ids.tolist())
    return sampled


@pytest.mark.parametrize("tp_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_sampling_is_the_same_on_all_ranks(pool: Pool, stock_dir: StockDir, tp_size: int) -> None:
    """Catches ranks that draw for themselves: all follow rank 0, and draw what the stock model draws from its state."""
    expected = _sample(stock_dir(), 1, stock=True)
    assert run_at(pool, tp_size, _sample, stock_dir(), tp_size) == [expected] * tp_size
    assert len({str(ids) for ids in expected}) == len(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches(stock_dir: StockDir, cache: str) -> None:
    """Catches a cache that is swallowed: its layers wait in the memory of the host, which takes a GPU to try."""
    prompts = {name: value.cuda() for name, value in _prompts("left").items()}
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    stock, ours = (load(stock_dir(), dtype=torch.float64).eval().cuda() for load in (GPT2.load_stock, GPT2.load))
    assert torch.equal(ours.generate(**prompts, **options), stock.generate(**prompts, **options))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_continuous_batching(stock_dir: StockDir, attention: str) -> None:
    """Catches a paged cache that is not updated, and arguments of it that are refused."""
    prompts = [ids[: 4 + i].tolist() for i, ids in enumerate(token_ids(3, 9))]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model = GPT2.load(stock_dir(), attn_implementation=attention)
    stock = GPT2.load_stock(stock_dir(), attention=attention).eval()
    results = model.generate_batch(prompts, settings, ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64))
    batched = [results[name].generated_tokens for name in sorted(results)]
    alone = [stock.generate(torch.tensor([ids]), settings)[0, len(ids) :].tolist() for ids in prompts]
    assert batched == alone


@on_live_ranks(2)
def test_continuous_batching_on_ranks_is_refused(stock_dir: StockDir) -> None:
    """Catches results that are empty: the paged cache has room for all heads, and each rank has some."""
    with pytest.raises(UnsupportedError, match="tp_size=2"):
        GPT2.load(stock_dir(), 2).generate_batch([[1, 2, 3]], GenerationConfig(max_new_tokens=2))


class _StopsOnOneRank(StoppingCriteria):
    """Ends all sequences at a length, on the last rank alone."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        is_done = rank() == 1 and input_ids.shape[1] >= 7
        return torch.full((len(input_ids),), is_done)


class _Streamer(BaseStreamer):
    """Collects tokens, and fails after some."""

    def __init__(self, fails_after: int = 99) -> None:
        self.tokens: list[torch.Tensor] = []
        self.fails_after = fails_after

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value)
        if len(self.tokens) > self.fails_after:
            raise ConnectionError("the reader is gone")

    def end(self) -> None:
        self.tokens.append(torch.tensor([-1]))


def _stop_together(directory: Path) -> list[Any]:
    """What each rank writes, or the error that it ends with."""
    model = GPT2.load(directory, 2)
    prompts = _prompts("none")
    streamer, is_second = _Streamer(), rank() == 1
    failing = {"streamer": _Streamer(3)} if is_second else {}
    cases: list[dict[str, Any]] = [
        {"max_time": 0.0 if is_second else 60.0},
        {"max_time": 0.0} if is_second else {},
        {"stopping_criteria": [_StopsOnOneRank()]},
        {"stopping_criteria": [_StopsOnOneRank()]} if is_second else {},
        {"stopping_criteria": [_StopsOnOneRank()], "num_beams": 2},
        {} if is_second else {"streamer": streamer},
        failing,
        {"input_ids": prompts["input_ids"] + rank()},
        {"max_new_tokens": 8 + rank()},
        {"num_beams": 2, **({"streamer": _Streamer()} if is_second else {})},
    ]
    results: list[Any] = []
    for case in cases:
        given = {**prompts, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": True, "pad_token_id": 0, **case}
        try:
            results.append(model.generate(**given).tolist())
        except (HfMegatronError, ConnectionError, ValueError) as error:
            results.append(f"{type(error).__name__}: {error}")
    results.append([token for part in streamer.tokens for token in part.flatten().tolist()])
    return results


def test_ranks_stop_together(pool: Pool, stock_dir: StockDir) -> None:
    """Catches ranks that wait for one whose clock, criteria or streamer ended it, and prompts that differ unnoticed."""
    first, second = pool(2).run(_stop_together, stock_dir())
    for case in range(6):
        assert first[case] == second[case]
    timed, at_once, criteria, one_criterion, beams, streamed = first[:6]
    assert {len(x[0]) for x in (timed, at_once)} == {5}
    assert {len(x[0]) for x in (criteria, one_criterion, beams)} == {7}
    assert len(streamed[0]) == 16
    assert second[6] == "ConnectionError: the reader is gone"
    assert first[6].startswith("RanksDifferError: the streamer of another rank failed")
    assert "prompt[1]['input_ids']: rank 1 differs from rank 0" in first[7]
    assert "argument max_new_tokens (8, 9 on ranks 0, 1)" in first[8]
    assert first[9] == second[9]
    assert "streamer" in first[9]
    assert first[10][:8] == [*streamed[0][:4], *streamed[1][:4]]
