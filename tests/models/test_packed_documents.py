"""Documents in one sequence whose positions begin anew, each computed as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.paper.data import PackedDocuments
from tests.models.architectures import GPT2, StockDir
from tests.models.reference import Pool, assert_agrees, layout, run_at

_END = 130
_DOCUMENTS = [[5, 6, 7, 8, 9], [20], [31, 32, 33], [40, 41, 42, 43, 44, 45, 46]]


def _compare(tp_size: int, kernel: str, use_cache: bool | None, sequence_parallel: bool) -> None:
    config = MegatronGPT2Config(
        vocab_size=131, n_embd=48, n_layer=2, n_head=4, n_positions=32, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )
    options: dict[str, Any] = {"attn_implementation": kernel, "dtype": torch.float64, "seed": 3}
    options["distributed_config"] = layout(tp_size, sequence_parallel=sequence_parallel)
    model = MegatronGPT2LMHeadModel.from_config(config, **options).eval()
    tokens = sum(len(document) + 1 for document in _DOCUMENTS)
    packed = PackedDocuments(_DOCUMENTS, length=tokens, end_of_document=_END, separate_documents=True)[0]
    given = {name: packed[name][None].expand(2, -1) for name in ("input_ids", "position_ids")}
    cache = {} if use_cache is None else {"use_cache": use_cache}
    logits = model(**given, **cache).logits
    joined = model(given["input_ids"]).logits
    start = 0
    for document in _DOCUMENTS:
        ids = torch.tensor([[*document, _END]])
        place = slice(start, start + ids.shape[1])
        assert_agrees(f"document at {start}", logits[1:, place], model(ids).logits)
        # Without positions they see each other, so that the test would notice.
        assert start == 0 or (logits[0, place] - joined[0, place]).abs().max() > 1e-3
        start = place.stop


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_a_document_is_as_it_is_alone(
    pool: Pool, tp_size: int, sequence_parallel: bool, kernel: str, use_cache: bool | None
) -> None:
    """Catches attention or positions that cross the end of a document; with a cache, which is the default, too."""
    run_at(pool, tp_size, _compare, tp_size, kernel, use_cache, sequence_parallel)


@pytest.fixture(scope="module")
def stock_dir(tmp_path_factory: pytest.TempPathFactory) -> StockDir:
    return StockDir(tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_batches_flattened_by_transformers(stock_dir: StockDir, kernel: str) -> None:
    """Catches a field of such batches that our forward refuses, or sequences that see each other."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": document} for document in _DOCUMENTS if len(document) > 1])
    stock = GPT2.load_stock(stock_dir(), attention=kernel, dtype=torch.float64)
    model = GPT2.load(stock_dir(), attn_implementation=kernel, dtype=torch.float64).train()
    GPT2.stock_step(stock, batch, use_cache=False)[1].backward()
    model(**batch).loss.backward()
    expected = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        assert_agrees(name, parameter.grad, expected[name].grad)
    joined = {name: batch[name] for name in ("input_ids", "labels")}
    assert (model(**batch).loss - model(**joined).loss).abs() > 1e-3
