"""What ranks send each other in a training step: the collectives of the paper, of the paper's sizes, and no others."""

import itertools
from pathlib import Path

import pytest
import torch

from hf_megatron.models.forward_arguments import CACHE
from tests.models.architectures import ARCHITECTURES, BERTS, GPT2, LAYERS, B, H, ModelCase, S, StockDir, V, token_ids
from tests.models.collectives import Collective, Recorder
from tests.models.reference import Pool, run_at
from tests.tiers import cases

Steps = dict[str, list[Collective]]

CLASSIFIER = "ForSequenceClassification"  # a head without a vocabulary


def _record_steps(
    case: ModelCase, head: str, directory: Path, tp_size: int, splits: bool = False, recompute: str | None = None
) -> Steps:
    model = case.load(directory, tp_size, head, sequence_parallel=splits, attn_implementation="eager").train()
    if recompute is not None:
        model.activation_checkpointing_enable({"recompute": recompute})
    optimizer = torch.optim.AdamW(model.parameters())
    batch = case.batch(head, length=_length(tp_size))
    if head != CLASSIFIER and not model.config.tie_word_embeddings:
        batch["label_smoothing"] = torch.tensor(0.1)
    recorders = {phase: Recorder() for phase in ("forward", "backward", "optimizer", "evaluation")}
    for _ in range(2):  # the second step has the optimizer's state to deal with
        for recorder in recorders.values():
            recorder.seen.clear()
        with recorders["forward"]:
            outputs = model(**batch)
        with recorders["backward"]:
            outputs.loss.backward()
        with recorders["optimizer"]:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad(), recorders["evaluation"]:
        model.eval()(batch["input_ids"])
    return {phase: recorder.seen for phase, recorder in recorders.items()}


def _length(tp_size: int) -> int:
    """Once one that the degree divides, once one that leaves a rank without positions."""
    return S if tp_size == 4 else S - 1


def _all_reduces(*hidden_sizes: int) -> list[Collective]:
    return [("allreduce_", number * H * 4) for number in hidden_sizes]


def _gather(numbers: int) -> Collective:
    return ("_allgather_base_", numbers * 4)


def _expected(case: ModelCase, head: str, tp_size: int, splits: bool) -> Steps:
    """What is gathered or scattered is filled up to a multiple of the degree."""
    tokens, rows = B * _length(tp_size), B * -(-_length(tp_size) // tp_size)
    gather, scatter = _gather(rows * tp_size * H), ("_reduce_scatter_base_", rows * H * 4)
    if splits:
        body = [*_all_reduces(tokens), *[gather, scatter] * 2 * LAYERS, gather]
        # Per half of a layer: g-bar of its second product, then of its first the input once more, and g. Then both
        # norms' weights and biases, and those of Q, K and V that are whole.
        layer = [*[gather, gather, scatter] * 2, *_all_reduces(4 + case.shared_bias)]
        backward = [*([] if case.ends_with_norm else _all_reduces(2)), *layer * LAYERS, gather]
    else:
        body = _all_reduces(*[tokens] * (1 + 2 * LAYERS))
        # From the last layer down: the MLP's, and the attention's, which carries a whole bias of Q, K and V along.
        backward = _all_reduces(*[tokens, tokens + case.shared_bias] * LAYERS)
    forward, evaluation = [*body], [*body]
    if head != CLASSIFIER:  # statistics of the tokens that are predicted, and their hidden states' gradient
        labels = case.batch(head, length=_length(tp_size))["labels"]
        predicted = int(((labels[:, 1:] if case.is_causal else labels) != -100).sum())
        forward.append(_gather((4 if tp_size == 4 else 3) * predicted * tp_size))
        if splits and case.is_causal:
            backward.insert(0, scatter)
        else:
            forward += _all_reduces(predicted)
        evaluation.append(_gather(-(-V // tp_size) * tp_size * tokens))
    return {"forward": forward, "backward": backward, "optimizer": [], "evaluation": evaluation}


@cases(
    "case, head, tp_size, splits",
    (
        (case, head, tp_size, splits)
        for case in ARCHITECTURES
        for head in (*dict.fromkeys((case.heads[0], case.language_model)), CLASSIFIER)
        for tp_size, splits in itertools.product((2, 4), (False, True))
    ),
    [
        *((case, case.heads[0], 4, False) for case in ARCHITECTURES),
        *((case, CLASSIFIER, 2, True) for case in BERTS),
        *((GPT2, "LMHeadModel", tp_size, True) for tp_size in (2, 4)),
        (GPT2, "LMHeadModel", 2, False),
        (ARCHITECTURES[2], CLASSIFIER, 2, False),
    ],
)
def test_collectives_of_a_training_step(
    pool: Pool, stock_dir: StockDir, case: ModelCase, head: str, tp_size: int, splits: bool
) -> None:
    """Catches a collective too many (for each of Q, K and V, or per parameter), or of the vocabulary's width."""
    directory = stock_dir(case, head, "untied" if tp_size == 4 else "base")
    seen = run_at(pool, tp_size, _record_steps, case, head, directory, tp_size, splits)
    assert seen == [_expected(case, head, tp_size, splits)] * tp_size


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_shared_heads_add_an_exchange(pool: Pool, stock_dir: StockDir, case: ModelCase) -> None:
    """Catches Q, K and V that are exchanged one by one, or whole heads: each of two ranks lacks 4 columns of one."""
    even, shared = (
        pool(2).run(_record_steps, case, CLASSIFIER, stock_dir(case, CLASSIFIER, variant), 2)[0]
        for variant in ("base", "shared_heads")
    )
    for phase, collectives in shared.items():
        exchanges = [collective for collective in collectives if collective[0] == "alltoall_base_"]
        assert exchanges == [("alltoall_base_", 3 * B * _length(2) * 4 * 4)] * (LAYERS if phase != "optimizer" else 0)
        assert len(collectives) - len(exchanges) == len(even[phase])


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_recomputation_repeats_what_it_must(pool: Pool, stock_dir: StockDir, case: ModelCase, splits: bool) -> None:
    """Catches recomputation that sends more than a layer without its last output, and selective one that sends.

    A layer that ends with a norm needs that norm's input for its gradient, and so all of the layer's collectives.
    """
    job = (case, CLASSIFIER, stock_dir(case, CLASSIFIER), 2, splits)
    once, full, selective = (pool(2).run(_record_steps, *job, kind)[0] for kind in (None, "full", "selective"))
    assert selective == once
    per_layer = once["forward"][1 : 5 if splits else 3]
    kept = len(per_layer) if case.ends_with_norm else len(per_layer) - 1
    assert len(full["backward"]) == len(once["backward"]) + LAYERS * kept
    assert sorted(full["backward"]) == sorted([*once["backward"], *per_layer[:kept] * LAYERS])


def _record_decoding(directory: Path, splits: bool) -> list[Collective]:
    model = GPT2.load(directory, 2, sequence_parallel=splits)
    cache = model(token_ids(B, 6), use_cache=True)[CACHE]
    recorder = Recorder()
    with recorder:
        model(token_ids(B, 1), **{CACHE: cache}, use_cache=True)
    return recorder.seen


def test_decoding_sends_what_it_sends_without(pool: Pool, stock_dir: StockDir) -> None:
    """Catches a single position split over the ranks: twice the collectives, and nothing to gain."""
    expected = pool(2).run(_record_decoding, stock_dir(), False)
    assert pool(2).run(_record_decoding, stock_dir(), True) == expected
    assert len(expected[0]) == 1 + 2 * LAYERS + 1
