"""What ranks send each other in a training step: the collectives of the paper, of the paper's sizes, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_megatron import MegatronGPT2LMHeadModel
from tests.models.reference import Pool, layout, make_batch, run_at

StockDir = Callable[[str], Path]
Collective = tuple[str, int]  # name and bytes of the result

B, S, H, V, LAYERS = 3, 9, 48, 131, 2
FLOAT = 4


class _Recorder(TorchDispatchMode):
    """Notes every collective, whoever issues it: by torch.distributed or by DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor") and "wait" not in name:
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            self.seen.append((name, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def _all_reduces(*numbers_of_floats: int) -> list[Collective]:
    return [("allreduce_", number * FLOAT) for number in numbers_of_floats]


def _record_steps(
    directory: Path, tp_size: int, label_smoothing: float, checkpointing: bool
) -> dict[str, list[Collective]]:
    model = MegatronGPT2LMHeadModel.from_pretrained(directory, distributed_config=layout(tp_size)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = make_batch("right")
    seen = {}
    for _ in range(2):  # the second step has the optimizer's state to deal with
        with _Recorder() as recorder:
            outputs = model(**batch, label_smoothing=label_smoothing)
        seen["forward"] = recorder.seen
        with _Recorder() as recorder:
            outputs.loss.backward()
        seen["backward"] = recorder.seen
        with _Recorder() as recorder:
            optimizer.step()
            optimizer.zero_grad()
        seen["optimizer"] = recorder.seen
    del batch["labels"]
    with torch.no_grad(), _Recorder() as recorder:
        model.eval()(**batch)
    seen["evaluation"] = recorder.seen
    return seen


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("variant", ["base", "untied"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_collectives_of_a_training_step(
    pool: Pool, stock_dir: StockDir, variant: str, label_smoothing: float, tp_size: int
) -> None:
    """Catches a collective too many (a separate one for the QKV bias, one per replica), or of vocabulary width."""
    hidden, tokens = B * S * H, B * S
    forward = _all_reduces(hidden, *[hidden, hidden] * LAYERS, tokens, (3 if label_smoothing else 2) * tokens)
    # From the head down: its input, then per layer the MLP's and the attention's, which carries the QKV bias along.
    backward = _all_reduces(hidden, *[hidden, hidden + 3 * H] * LAYERS)
    rows = -(-V // tp_size) * tp_size  # shards are padded to the largest for the gather, then trimmed
    expected = {
        "forward": forward,
        "backward": backward,
        "optimizer": [],
        "evaluation": [*_all_reduces(*[hidden] * (1 + 2 * LAYERS)), ("_allgather_base_", rows * tokens * FLOAT)],
    }
    seen = run_at(pool, tp_size, _record_steps, stock_dir(variant), tp_size, label_smoothing, False)
    assert seen == [expected] * tp_size


def test_checkpointing_repeats_only_the_recomputed_half(pool: Pool, stock_dir: StockDir) -> None:
    """Catches recomputation that sends more than it has to: per layer the attention's output, not the MLP's."""
    (seen, _) = run_at(pool, 2, _record_steps, stock_dir("base"), 2, 0.0, True)
    hidden = B * S * H
    assert seen["backward"] == _all_reduces(hidden, *[hidden, hidden, hidden + 3 * H] * LAYERS)


def test_one_process_communicates_with_nobody(stock_dir: StockDir) -> None:
    """Catches a collective issued for a group of one."""
    seen = _record_steps(stock_dir("base"), 1, 0.1, False)
    assert seen == {"forward": [], "backward": [], "optimizer": [], "evaluation": []}
