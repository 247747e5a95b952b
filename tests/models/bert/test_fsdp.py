"""Tensor parallelism under FSDP2: a data-parallel step is the step that one process makes on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronBertForPreTraining
from tests.models.bert.reference import BertDir, Tensors, gradients, make_inputs, make_labels, stock_class
from tests.models.reference import Pool, assert_agrees, assert_all_agree, assert_all_equal, full_weights


def _train_and_save(
    placement: str, stock_directory: Path, directory: Path, tp_size: int, fsdp_size: int
) -> dict[str, torch.Tensor]:
    """Two AdamW steps beside the stock model, then both kinds of save; the weights at the end."""
    load: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    stock = stock_class(placement, "ForPreTraining").from_pretrained(stock_directory, **load).train()
    layout = DistributedConfig(tp_size=tp_size, fsdp_size=fsdp_size)
    ours = MegatronBertForPreTraining.from_pretrained(stock_directory, distributed_config=layout, **load).train()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3) for model in (stock, ours)]
    for step in range(2):
        batch = _batch(step)
        loss = stock(**batch).loss
        loss.backward()
        mine = slice(2 * (dist.get_rank() // tp_size), 2 * (dist.get_rank() // tp_size) + 2)
        my_loss = ours(**{name: value[mine] for name, value in batch.items()}).loss
        my_loss.backward()
        mean = my_loss.detach().clone()
        dist.all_reduce(mean)
        assert_agrees("loss", mean / dist.get_world_size(), loss)
        assert_all_agree("gradient", gradients(ours), gradients(stock))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_all_agree("weight", full_weights(ours), full_weights(stock))
    ours.save_pretrained(directory / "hub")
    ours.save_pretrained(directory / "tp", distributed_checkpoint=True)
    return full_weights(ours)


def _batch(step: int) -> Tensors:
    """Four sequences; the first and second two have as many labels, so that the mean of their losses is the whole."""
    batch = {**make_inputs("ForPreTraining", "none"), **make_labels("ForPreTraining", "none")}
    batch = {name: torch.cat([value[:1], value], dim=0).roll(step, 0) for name, value in batch.items()}
    batch["input_ids"][0, 1] += 1
    counts = (batch["labels"] != -100).sum(dim=1)
    assert counts[:2].sum() == counts[2:].sum()
    return batch


@pytest.mark.parametrize(
    ("placement", "variant", "tp_size", "fsdp_size"),
    [
        ("pre", "base", 2, 2),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in (
                ("post", "base", 1, 2),
                ("post", "base", 2, 2),
                ("pre", "untied", 2, 2),
                ("post", "untied", 2, 2),
            )
        ),
    ],
)
def test_training_equals_one_process(
    pool: Pool, bert_dir: BertDir, tmp_path: Path, placement: str, variant: str, tp_size: int, fsdp_size: int
) -> None:
    """Catches two FSDP parameters for the tied decoder or its bias, and gradients that a mesh dimension misses."""
    stock = bert_dir(placement, "ForPreTraining", variant)
    weights = pool(tp_size * fsdp_size).run(_train_and_save, placement, stock, tmp_path, tp_size, fsdp_size)[0]
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    assert_all_equal(stored, weights)
    assert stored.keys() == load_file(stock / "model.safetensors").keys()
    assert_all_equal(full_weights(MegatronBertForPreTraining.from_pretrained(tmp_path / "tp")), weights)
