"""What ranks send each other in a training step: the collectives of the paper, of the paper's sizes, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_megatron import MegatronGPT2LMHeadModel
from tests.models.collectives import Collective, Recorder, all_reduces
from tests.models.reference import Pool, layout, make_batch, run_at

StockDir = Callable[[str], Path]

B, S, H, V, LAYERS = 3, 9, 48, 131, 2
FLOAT = 4
PREDICTED = int((make_batch("right")["labels"][:, 1:] != -100).sum())


def _record_steps(
    directory: Path, tp_size: int, label_smoothing: float, recompute: str | None = None
) -> dict[str, list[Collective]]:
    model = MegatronGPT2LMHeadModel.from_pretrained(
        directory, distributed_config=layout(tp_size), attn_implementation="eager"
    ).train()
    if recompute is not None:
        model.activation_checkpointing_enable({"recompute": recompute})
    optimizer = torch.optim.AdamW(model.parameters())
    batch = make_batch("right")
    seen = {}
    for _ in range(2):  # the second step has the optimizer's state to deal with
        with Recorder() as recorder:
            outputs = model(**batch, label_smoothing=label_smoothing)
        seen["forward"] = recorder.seen
        with Recorder() as recorder:
            outputs.loss.backward()
        seen["backward"] = recorder.seen
        with Recorder() as recorder:
            optimizer.step()
            optimizer.zero_grad()
        seen["optimizer"] = recorder.seen
    del batch["labels"]
    with torch.no_grad(), Recorder() as recorder:
        model.eval()(**batch)
    seen["evaluation"] = recorder.seen
    return seen


@pytest.mark.parametrize(
    ("variant", "label_smoothing", "tp_size"), [("base", 0.0, 2), ("untied", 0.1, 2), ("base", 0.1, 4)]
)
def test_collectives_of_a_training_step(
    pool: Pool, stock_dir: StockDir, variant: str, label_smoothing: float, tp_size: int
) -> None:
    """Catches a collective too many (a separate one for the QKV bias, one per replica), or of vocabulary width."""
    hidden, tokens = B * S * H, B * S
    # The head and the loss: statistics of the tokens that are predicted, and their hidden states' gradient.
    statistics = (4 if label_smoothing else 3) * PREDICTED * tp_size
    head = [("_allgather_base_", statistics * FLOAT), *all_reduces(PREDICTED * H)]
    forward = [*all_reduces(hidden, *[hidden, hidden] * LAYERS), *head]
    # From the last layer down: the MLP's, and the attention's, which carries the QKV bias along.
    backward = all_reduces(*[hidden, hidden + 3 * H] * LAYERS)
    rows = -(-V // tp_size) * tp_size  # shards are padded to the largest for the gather, then trimmed
    expected = {
        "forward": forward,
        "backward": backward,
        "optimizer": [],
        "evaluation": [*all_reduces(*[hidden] * (1 + 2 * LAYERS)), ("_allgather_base_", rows * tokens * FLOAT)],
    }
    seen = run_at(pool, tp_size, _record_steps, stock_dir(variant), tp_size, label_smoothing)
    assert seen == [expected] * tp_size


def test_checkpointing_repeats_only_the_recomputed_half(pool: Pool, stock_dir: StockDir) -> None:
    """Catches recomputation that sends more than it has to: per layer the attention's output, not the MLP's."""
    (seen, _) = run_at(pool, 2, _record_steps, stock_dir("base"), 2, 0.0, "full")
    hidden = B * S * H
    assert seen["backward"] == all_reduces(*[hidden, hidden, hidden + 3 * H] * LAYERS)


def test_selective_recomputation_sends_nothing(pool: Pool, stock_dir: StockDir) -> None:
    """Catches a recomputation that goes beyond what each rank does with its own heads."""
    expected = run_at(pool, 2, _record_steps, stock_dir("base"), 2, 0.0)
    assert run_at(pool, 2, _record_steps, stock_dir("base"), 2, 0.0, "selective") == expected


def test_one_process_communicates_with_nobody(stock_dir: StockDir) -> None:
    """Catches a collective issued for a group of one."""
    seen = _record_steps(stock_dir("base"), 1, 0.1)
    assert seen == {"forward": [], "backward": [], "optimizer": [], "evaluation": []}
