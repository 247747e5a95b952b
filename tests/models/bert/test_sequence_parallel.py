"""Sequence parallelism: the numbers of the stock classes, though between the layers no rank has the whole sequence."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronBertConfig, MegatronBertForPreTraining
from hf_megatron.errors import UnsupportedError
from tests.models.bert.reference import (
    HEADS,
    PLACEMENTS,
    TINY,
    BertDir,
    Tensors,
    assert_outputs_agree,
    gradients,
    loss_of,
    make_inputs,
    make_labels,
    our_class,
    save_stock_bert,
    stock_class,
)
from tests.models.collectives import Collective, Recorder
from tests.models.reference import (
    Pool,
    assert_agrees,
    assert_all_agree,
    assert_replicas_equal,
    assert_same_on_all_ranks,
    full_weights,
    layout,
    rank,
    run_at,
)
from tests.tiers import quick

B, H, LAYERS = 3, 48, 2


def _cut_to(length: int, tensors: Tensors) -> Tensors:
    """The first positions of what has them; a choice or an answer stays."""
    return {n: x[..., :length].contiguous() if x.shape[-1] == 9 else x for n, x in tensors.items()}


def _load(head: str, directory: Path, tp_size: int, *, sequence_parallel: bool = True, **options: Any) -> Any:
    split = layout(tp_size, sequence_parallel=sequence_parallel)
    return our_class(head).from_pretrained(directory, distributed_config=split, **options)


def _compare(
    placement: str, head: str, directory: Path, tp_size: int, attentions: list[str], lengths: tuple[int, ...]
) -> None:
    """A training step with AdamW and an evaluation for every combination, on the same weights as they develop."""
    for attention in attentions:
        # Stock MegatronBert has eager attention only.
        load: dict[str, Any] = {"dtype": torch.float64}
        stock = stock_class(placement, head).from_pretrained(directory, attn_implementation="eager", **load).train()
        ours = _load(head, directory, tp_size, attn_implementation=attention, **load)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3) for model in (stock, ours)]
        # Kernels other than eager do not keep the probabilities.
        extras = {"output_hidden_states": True, "output_attentions": attention == "eager"}
        for length in lengths:
            inputs, labels = (_cut_to(length, make(head, "right")) for make in (make_inputs, make_labels))
            valid = inputs["attention_mask"].bool().flatten(0, -2)
            context = f"{attention}, length {length}"
            expected = stock(**inputs, **labels, **extras)
            loss_of(expected, valid).backward()
            with torch.no_grad():
                outputs = ours.eval()(**inputs, **labels, **extras)
            assert_outputs_agree(context, outputs, expected, valid)
            assert_same_on_all_ranks(f"{context}: output", next(v for k, v in outputs.items() if k != "loss"))
            loss = loss_of(ours.train()(**inputs, **labels), valid)
            loss.backward()
            assert_agrees(f"{context}: loss", loss, loss_of(expected, valid))
            assert_all_agree(f"{context}: gradient", gradients(ours), gradients(stock))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert_all_agree(f"{context}: weight", full_weights(ours), full_weights(stock))
        assert_replicas_equal(ours)


_QUICK = {
    ("pre", "ForPreTraining", 4),
    ("post", "ForMultipleChoice", 2),
}
_CASES = quick(itertools.product(PLACEMENTS, HEADS, (2, 4)), _QUICK)


@pytest.mark.parametrize(("placement", "head", "tp_size"), _CASES)
def test_heads_equal_stock(pool: Pool, bert_dir: BertDir, placement: str, head: str, tp_size: int) -> None:
    """Catches gradients that stay partial sums or are summed twice, and a head or pooler that reads one rank's part."""
    # Over 4 ranks 9 positions are 3, 3, 3 and none.
    job = (placement, head, bert_dir(placement, head), tp_size, ["sdpa", "eager"], (9, 8))
    pool(tp_size).run(_compare, *job)


# ---------------------------------------------------------------------- dropout


def _train_with_dropout(
    directory: Path, tp_size: int, attention: str, sequence_parallel: bool, reentrant: bool | None
) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
    """Two training steps: their losses, the sum of their gradients, and the random state they leave behind."""
    torch.manual_seed(1 + rank())  # loading puts the ranks in step with rank 0
    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": attention}
    model = _load("ForPreTraining", directory, tp_size, sequence_parallel=sequence_parallel, **options).train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    losses = []
    for padding, length in (("right", 9), ("left", 8)):
        batch = {**make_inputs("ForPreTraining", padding), **make_labels("ForPreTraining", padding)}
        loss = model(**_cut_to(length, batch)).loss
        loss.backward()
        losses.append(loss.detach())
    assert_same_on_all_ranks("random state", torch.get_rng_state())
    return torch.stack(losses), gradients(model), torch.get_rng_state()


@pytest.mark.parametrize(
    ("placement", "attention", "tp_size", "reentrant"),
    [("pre", "eager", 4, None), ("post", "sdpa", 2, None), ("pre", "sdpa", 2, False), ("post", "eager", 2, True)],
)
def test_dropout_is_that_of_one_process(
    pool: Pool, tmp_path: Path, placement: str, attention: str, tp_size: int, reentrant: bool | None
) -> None:
    """Catches masks drawn for this rank's positions, in the forward pass or in a recomputation."""
    dropout = {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.1}
    save_stock_bert(tmp_path, placement, "ForPreTraining", **dropout)
    (expected,) = run_at(pool, 1, _train_with_dropout, tmp_path, 1, attention, False, None)
    for losses, grads, state in pool(tp_size).run(_train_with_dropout, tmp_path, tp_size, attention, True, reentrant):
        assert_agrees("losses", losses, expected[0])
        assert_all_agree("gradient", grads, expected[1])
        assert torch.equal(state, expected[2])


# ---------------------------------------------------------------------- what is sent


def _record_step(directory: Path, tp_size: int) -> dict[str, list[Collective]]:
    model = _load("ForSequenceClassification", directory, tp_size).train()
    batch = {**make_inputs("ForSequenceClassification"), **make_labels("ForSequenceClassification")}
    with Recorder() as forward:
        loss = model(**batch).loss
    with Recorder() as backward:
        loss.backward()
    return {"forward": forward.seen, "backward": backward.seen}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_collectives_of_a_training_step(pool: Pool, bert_dir: BertDir, placement: str) -> None:
    """Catches a gather for each of query, key and value, an all-reduce that is left, and a bucket per parameter."""
    rows, length = 10, 9
    whole = ("allreduce_", B * length * H * 4)
    gather, scatter = ("_allgather_base_", B * rows * H * 4), ("_reduce_scatter_base_", B * rows // 2 * H * 4)
    bucket = ("allreduce_", (4 + 2) * H * 4)  # both norms' weights and biases, and two biases behind a sum over ranks
    last_norm = [("allreduce_", 2 * H * 4)] if placement == "pre" else []
    half = [gather, gather, scatter]
    expected = {
        "forward": [whole, *[gather, scatter] * 2 * LAYERS, gather],
        "backward": [*last_norm, *[*half, *half, bucket] * LAYERS, gather],
    }
    directory = bert_dir(placement, "ForSequenceClassification")
    assert pool(2).run(_record_step, directory, 2) == [expected] * 2


# ---------------------------------------------------------------------- FSDP2, and what is refused


def _train_under_fsdp(placement: str, directory: Path) -> None:
    """Two AdamW steps with recomputation beside the stock model on the whole batch."""
    stock = stock_class(placement, "ForPreTraining").from_pretrained(directory, dtype=torch.float64).train()
    split = DistributedConfig(tp_size=2, fsdp_size=2, enable_sequence_parallel=True)
    ours = MegatronBertForPreTraining.from_pretrained(directory, distributed_config=split, dtype=torch.float64).train()
    ours.activation_checkpointing_enable()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3) for model in (stock, ours)]
    batch = {**make_inputs("ForPreTraining", "none"), **make_labels("ForPreTraining", "none")}
    batch = {name: torch.cat([value[:1], value], dim=0) for name, value in batch.items()}
    mine = slice(2 * (dist.get_rank() // 2), 2 * (dist.get_rank() // 2) + 2)
    for _ in range(2):
        stock(**batch).loss.backward()
        ours(**{name: value[mine] for name, value in batch.items()}).loss.backward()
        assert_all_agree("gradient", gradients(ours), gradients(stock))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_all_agree("weight", full_weights(ours), full_weights(stock))


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_fsdp(pool: Pool, bert_dir: BertDir, placement: str) -> None:
    """Catches a bucket whose parameters FSDP has not gathered, or has taken back before their gradients are whole."""
    pool(4).run(_train_under_fsdp, placement, bert_dir(placement, "ForPreTraining"))


def test_chunks_of_positions_are_refused() -> None:
    """Catches ranks that walk through different numbers of chunks and wait for each other forever."""
    config = MegatronBertConfig(**{**TINY, "chunk_size_feed_forward": 3})
    config.distributed_config = DistributedConfig(tp_size=2, enable_sequence_parallel=True)
    with pytest.raises(UnsupportedError, match="chunk_size_feed_forward=3 with enable_sequence_parallel=True"):
        MegatronBertForPreTraining(config)
