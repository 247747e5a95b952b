"""Training until a model is sure, in bfloat16: where a gradient that is lost in rounding shows, and only there."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tests.models.architectures import GPT2
from tests.models.reference import Pool, run_at

_SIZES = {"n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 16, "vocab_size": 61}
_EXACT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
_STEPS, _WARM_UP, _RATE = 160, 20, 4e-3


def _losses(model: PreTrainedModel, order: list[int]) -> list[float]:
    """The loss of each step on the same sequences, whose order decides in which order numbers are added up."""
    ids = torch.randint(_SIZES["vocab_size"], (4, 16), generator=torch.Generator().manual_seed(1))[order]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0, foreach=False)
    found = []
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _RATE * min(1.0, (step + 1) / _WARM_UP)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def _follow_stock(directory: Path, tp_size: int) -> None:
    stock = []
    for seed in range(3):
        model = GPT2LMHeadModel.from_pretrained(directory).train()
        model.loss_type = "ForCausalLM"  # the mean over the tokens that are predicted
        stock.append(_losses(model, torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist()))
    ours = _losses(GPT2.load(directory, tp_size).train(), list(range(4)))
    assert ours[0] > 4.0
    assert ours[-1] < 0.01
    for step, (loss, *of_stock) in enumerate(zip(ours, *stock, strict=True)):
        middle, spread = sum(of_stock) / 3, max(of_stock) - min(of_stock)
        assert abs(loss - middle) <= max(0.02 * middle, spread), f"step {step}: {loss}, stock {of_stock}"


@pytest.mark.parametrize("tp_size", [1, 2])
def test_bfloat16_trains_as_stock_down_to_nothing(pool: Pool, tmp_path: Path, tp_size: int) -> None:
    """Catches gradients of the fused loss that are lost in rounding where the model is sure of its targets."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**_SIZES, **_EXACT)).save_pretrained(tmp_path)
    run_at(pool, tp_size, _follow_stock, tmp_path, tp_size, timeout=250)
