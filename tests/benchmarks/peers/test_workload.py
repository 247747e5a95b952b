"""The work itself: the same for all, and counted right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.workload import TINY_WORKLOADS, Workload, batch_of, generate, training_flops

_CPU = torch.device("cpu")
_GPT2, _BERT = TINY_WORKLOADS["gpt2-tiny"], TINY_WORKLOADS["bert-tiny"]


def test_bert_predicts_a_share_of_the_positions() -> None:
    """Catches a head that is measured with more or fewer positions than told."""
    workload = replace(_BERT, sequence=200, batch=3)
    batch = batch_of(workload, _CPU)
    labelled = batch["labels"] != -100
    assert labelled.sum() == 90
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])


def test_every_process_has_the_same_batch() -> None:
    """Catches a batch that depends on the process's own random state."""
    torch.manual_seed(1)
    first = batch_of(_GPT2, _CPU)
    torch.manual_seed(2)
    assert all(torch.equal(first[name], tensor) for name, tensor in batch_of(_GPT2, _CPU).items())


@pytest.mark.parametrize("model", ["gpt2", "bert", "llama"])
def test_the_checkpoint_is_stock_and_reproducible(model: str, tmp_path: Path) -> None:
    """Catches weights that stock does not load, that differ from run to run, or biases at zero."""
    workload = Workload(model, 1, 32, 4, vocab=96, sequence=8, dtype="bfloat16")
    for directory in ("a", "b"):
        generate(workload, tmp_path / directory)
    first, second = (load_file(tmp_path / directory / "model.safetensors") for directory in ("a", "b"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert all(tensor.dtype == torch.bfloat16 and tensor.float().std() > 0 for tensor in first.values())
    _, info = workload.stock_class().from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("workload", [replace(_GPT2, batch=2), replace(_BERT, batch=2, labelled=1.0)])
def test_flops_are_those_of_the_stock_model(workload: Workload) -> None:
    """Catches a term left out or counted twice in what MFU is computed from.

    Stock computes all of causal attention, of which the formula counts half.
    """
    model = workload.stock_class()(workload.stock_config())
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**batch_of(workload, _CPU)).loss.backward()
    attention = 4 * workload.tokens * workload.sequence * workload.hidden * workload.layers
    above_diagonal = 3 * attention / 2 if workload.model == "gpt2" else 0
    assert training_flops(workload) + above_diagonal == counter.get_total_flops()


def test_only_labelled_positions_cost_a_head() -> None:
    """Catches an MFU of BERT inflated by logits that nobody needs."""
    all_of_them, some = (training_flops(replace(_BERT, labelled=share)) for share in (1.0, 0.25))
    head = 2 * _BERT.hidden * (_BERT.vocab + _BERT.hidden)
    assert all_of_them - some == 3 * head * _BERT.tokens * 0.75
