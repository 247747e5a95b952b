"""What ranks send each other in a training step: the collectives of the paper, of the paper's sizes, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.bert.reference import PLACEMENTS, BertDir, make_inputs, make_labels, our_class
from tests.models.collectives import Collective, Recorder, all_reduces
from tests.models.reference import Pool, layout, run_at
from tests.tiers import quick

B, S, H, V, LAYERS = 3, 9, 48, 131, 2
LABELLED = int((make_labels("ForMaskedLM")["labels"] != -100).sum())


def _record_steps(
    head: str, directory: Path, tp_size: int, recompute: str | None = None
) -> dict[str, list[Collective]]:
    model = (
        our_class(head)
        .from_pretrained(directory, distributed_config=layout(tp_size), attn_implementation="eager")
        .train()
    )
    if recompute is not None:
        model.activation_checkpointing_enable({"recompute": recompute})
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, labels = make_inputs(head), make_labels(head)
    recorders = {phase: Recorder() for phase in ("forward", "backward", "optimizer", "evaluation")}
    for _ in range(2):  # the second step has the optimizer's state to deal with
        for recorder in recorders.values():
            recorder.seen.clear()
        with recorders["forward"]:
            outputs = model(**inputs, **labels)
        with recorders["backward"]:
            outputs.loss.backward()
        with recorders["optimizer"]:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad(), recorders["evaluation"]:
        model.eval()(**inputs)
    return {phase: recorder.seen for phase, recorder in recorders.items()}


_STEPS = [("ForPreTraining", 2), ("ForPreTraining", 4), ("ForMaskedLM", 2), ("ForSequenceClassification", 2)]


@pytest.mark.parametrize(
    ("placement", "head", "tp_size"),
    quick(
        ((placement, *step) for placement in PLACEMENTS for step in _STEPS),
        [("pre", "ForPreTraining", 2), ("post", "ForPreTraining", 4), ("post", "ForSequenceClassification", 2)],
    ),
)
def test_collectives_of_a_training_step(pool: Pool, bert_dir: BertDir, placement: str, head: str, tp_size: int) -> None:
    """Catches an f for each of query, key and value, a norm that communicates, and anything of vocabulary width.

    Per layer there are two forward and two backward. The embedding adds one forward; a masked-LM head
    one of the labelled positions' statistics and one of their hidden states' gradient.
    """
    hidden = B * S * H
    body = all_reduces(*[hidden] * (1 + 2 * LAYERS))
    has_vocabulary = head != "ForSequenceClassification"
    rows = -(-V // tp_size) * tp_size  # shards are padded to the largest for the gather, then trimmed
    gather = [("_allgather_base_", rows * B * S * 4)] if has_vocabulary else []
    head_and_loss = (
        [("_allgather_base_", 3 * LABELLED * tp_size * 4), *all_reduces(LABELLED * H)] if has_vocabulary else []
    )
    expected = {
        "forward": [*body, *head_and_loss],
        "backward": all_reduces(*[hidden] * 2 * LAYERS),
        "optimizer": [],
        "evaluation": [*body, *gather],
    }
    seen = run_at(pool, tp_size, _record_steps, head, bert_dir(placement, head), tp_size)
    assert seen == [expected] * tp_size


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_checkpointing_repeats_only_the_recomputed_half(pool: Pool, bert_dir: BertDir, placement: str) -> None:
    """Catches recomputation that sends more than it has to: per layer the attention's output, and the MLP's for post.

    With ``pre`` a layer ends with a sum, whose value nobody needs for the gradient; with ``post`` it ends with a norm.
    """
    (seen, _) = run_at(pool, 2, _record_steps, "ForMaskedLM", bert_dir(placement, "ForMaskedLM"), 2, "full")
    per_layer = 3 if placement == "pre" else 4
    assert seen["backward"] == all_reduces(*[B * S * H] * per_layer * LAYERS)


def test_selective_recomputation_sends_nothing(pool: Pool, bert_dir: BertDir) -> None:
    """Catches a recomputation that goes beyond what each rank does with its own heads."""
    directory = bert_dir("pre", "ForMaskedLM")
    expected = run_at(pool, 2, _record_steps, "ForMaskedLM", directory, 2)
    assert run_at(pool, 2, _record_steps, "ForMaskedLM", directory, 2, "selective") == expected


def test_one_process_communicates_with_nobody(bert_dir: BertDir) -> None:
    """Catches a collective issued for a group of one."""
    seen = _record_steps("ForPreTraining", bert_dir("pre"), 1)
    assert seen == {"forward": [], "backward": [], "optimizer": [], "evaluation": []}
