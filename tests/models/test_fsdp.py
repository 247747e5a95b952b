"""Tensor parallelism under FSDP2: a data-parallel step is the step that one process makes on the whole batch."""

import itertools
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

from tests.models.architectures import ARCHITECTURES, GPT2, ModelCase, StockDir
from tests.models.reference import (
    Batch,
    Pool,
    assert_agrees,
    assert_all_agree,
    assert_all_equal,
    full,
    full_weights,
    gradients,
)
from tests.tiers import cases

LAYOUTS = {
    "tp2 x fsdp2": {"tp_size": 2, "fsdp_size": 2},
    "fsdp2": {"tp_size": 1, "fsdp_size": 2},
    "tp2 x replicate2": {"tp_size": 2, "dp_replicate_size": 2},
    "tp2 x fsdp2, split sequences": {"tp_size": 2, "fsdp_size": 2, "enable_sequence_parallel": True},
}


def _batch(case: ModelCase, step: int) -> Batch:
    """Four sequences; the first and second two have as many labels, so that the mean of their losses is the whole."""
    batch = case.batch(None, "none")
    batch = {name: torch.cat([value[:1], value], dim=0).roll(step, 0) for name, value in batch.items()}
    batch["input_ids"][0, 1] += 1
    counts = (batch["labels"] != -100).sum(dim=1)
    assert counts[:2].sum() == counts[2:].sum()
    return batch


def _train_and_save(case: ModelCase, stock_directory: Path, directory: Path, sizes: dict[str, int]) -> None:
    """Two AdamW steps beside the stock model, then both kinds of save."""
    stock = case.load_stock(stock_directory, dtype=torch.float64)
    ours = case.ours().from_pretrained(
        stock_directory, distributed_config=DistributedConfig(**sizes), dtype=torch.float64, attn_implementation="eager"
    )
    ours.train()
    if "enable_sequence_parallel" in sizes:
        ours.activation_checkpointing_enable()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3) for model in (stock, ours)]
    first = 2 * (dist.get_rank() // sizes["tp_size"])
    for step in range(2):
        batch = _batch(case, step)
        _, loss = case.stock_step(stock, batch)
        loss.backward()
        my_loss = ours(**{name: value[first : first + 2] for name, value in batch.items()}).loss
        my_loss.backward()
        mean = my_loss.detach().clone()
        dist.all_reduce(mean)
        assert_agrees("loss", mean / dist.get_world_size(), loss)
        assert_all_agree("gradient", gradients(ours), gradients(stock))
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) for model in (stock, ours)]
        assert_agrees("norm", full(norms[1]), norms[0])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = full_weights(ours)
    assert_all_agree("weight", weights, full_weights(stock))
    ours.save_pretrained(directory / "hub")
    ours.save_pretrained(directory / "tp", distributed_checkpoint=True)
    assert "sequence_parallel" not in (directory / "hub" / "config.json").read_text()
    stored = load_file(directory / "hub" / "model.safetensors")
    assert_all_equal(stored, {name: value for name, value in weights.items() if name in stored})
    assert stored.keys() == load_file(stock_directory / "model.safetensors").keys()
    assert_all_equal(full_weights(case.load(directory / "tp")), weights)


@cases(
    "case, variant, layout",
    [
        *itertools.product(ARCHITECTURES, ("base",), LAYOUTS),
        *itertools.product(ARCHITECTURES, ("untied", "shared_heads"), ("tp2 x fsdp2",)),
    ],
    [(GPT2, "untied", "tp2 x fsdp2"), (GPT2, "shared_heads", "tp2 x fsdp2"), (ARCHITECTURES[1], "base", "tp2 x fsdp2")],
)
def test_training_equals_one_process(
    pool: Pool, stock_dir: StockDir, tmp_path: Path, case: ModelCase, variant: str, layout: str
) -> None:
    """Catches two parameters for what is tied, a gradient missed or counted twice, and parameters not gathered."""
    sizes = LAYOUTS[layout]
    num_ranks = prod(value for name, value in sizes.items() if name.endswith("_size"))
    pool(num_ranks).run(_train_and_save, case, stock_dir(case, None, variant), tmp_path, sizes)
    _, info = case.stock().from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(info.values()), info
