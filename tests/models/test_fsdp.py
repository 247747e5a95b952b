"""Tensor parallelism under FSDP2: a data-parallel step is the step that one process makes on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronGPT2LMHeadModel
from tests.models.reference import (
    Pool,
    assert_agrees,
    assert_all_agree,
    assert_all_equal,
    full,
    full_gradients,
    full_weights,
    reference_loss,
    token_ids,
)

StockDir = Callable[[str], Path]

LAYOUTS = {
    "tp2 x fsdp2": {"tp_size": 2, "fsdp_size": 2},
    "fsdp2": {"tp_size": 1, "fsdp_size": 2},
    "tp2 x replicate2": {"tp_size": 2, "dp_replicate_size": 2},
    "tp2 x fsdp2, split sequences": {"tp_size": 2, "fsdp_size": 2, "enable_sequence_parallel": True},
}


def _train_and_save(stock_directory: Path, directory: Path, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Two AdamW steps beside the stock model, then both kinds of save; the weights at the end."""
    load: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    stock = GPT2LMHeadModel.from_pretrained(stock_directory, **load).train()
    ours = MegatronGPT2LMHeadModel.from_pretrained(
        stock_directory, distributed_config=DistributedConfig(**sizes), **load
    ).train()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3) for model in (stock, ours)]
    ranks_with_same_data = sizes["tp_size"]
    mine = slice(2 * (dist.get_rank() // ranks_with_same_data), 2 * (dist.get_rank() // ranks_with_same_data) + 2)
    for step in range(2):
        ids = token_ids(4, 7, seed=step)
        loss = reference_loss(stock(ids).logits, ids)
        loss.backward()
        my_loss = ours(ids[mine], labels=ids[mine]).loss
        my_loss.backward()
        mean = my_loss.detach().clone()
        dist.all_reduce(mean)
        assert_agrees("loss", mean / dist.get_world_size(), loss)
        assert_all_agree("gradient", full_gradients(ours), full_gradients(stock))
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) for model in (stock, ours)]
        assert_agrees("norm", full(norms[1]), norms[0])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_all_agree("weight", full_weights(ours), full_weights(stock))
    ours.save_pretrained(directory / "hub")
    ours.save_pretrained(directory / "tp", distributed_checkpoint=True)
    return full_weights(ours)


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("untied", "tp2 x fsdp2"),
        pytest.param("base", "tp2 x fsdp2, split sequences", marks=pytest.mark.slow),
        pytest.param("base", "tp2 x fsdp2", marks=pytest.mark.slow),
        pytest.param("base", "fsdp2", marks=pytest.mark.slow),
        pytest.param("base", "tp2 x replicate2", marks=pytest.mark.slow),
    ],
)
def test_training_equals_one_process(
    pool: Pool, stock_dir: StockDir, tmp_path: Path, variant: str, layout: str
) -> None:
    """Catches two FSDP parameters for one tied weight, and gradients that a mesh dimension misses or counts twice."""
    sizes = LAYOUTS[layout]
    weights = pool(prod(sizes.values())).run(_train_and_save, stock_dir(variant), tmp_path, sizes)[0]
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    assert_all_equal(stored, {name: value for name, value in weights.items() if name in stored})
    assert stored.keys() == load_file(stock_dir(variant) / "model.safetensors").keys()
    assert_all_equal(full_weights(MegatronGPT2LMHeadModel.from_pretrained(tmp_path / "tp")), weights)
    _, info = GPT2LMHeadModel.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(info.values()), info
