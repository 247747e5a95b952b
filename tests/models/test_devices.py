"""The same step on a GPU as on a CPU. `make test` has the CPU's half."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_megatron.tensor_parallel import SINGLE, vocab_parallel_linear_cross_entropy
from tests.models.architectures import ARCHITECTURES, GPT2, ModelCase, StockDir, V
from tests.models.reference import assert_agrees, assert_all_agree, gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IDS = torch.arange(2 * 16).view(2, 16)
LABELS = torch.where(IDS % 3 == 0, IDS, -100)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_step_equals_stock(stock_dir: StockDir, case: ModelCase, device: str) -> None:
    """Catches a kernel that is used on one kind of device and computes something else."""
    head = case.language_model
    stock = case.load_stock(stock_dir(case, head), head, dtype=torch.float64, attention="sdpa").to(device)
    ours = case.load(stock_dir(case, head), head=head, dtype=torch.float64).to(device)
    batch = {"input_ids": IDS.to(device), "labels": LABELS.to(device)}
    expected, loss = case.stock_step(stock, batch)
    loss.backward()
    actual = ours.train()(**batch).loss
    actual.backward()
    assert_agrees("loss", actual, loss)
    assert_all_agree("gradient", gradients(ours), gradients(stock))
    assert_agrees("logits", ours.eval()(input_ids=batch["input_ids"]).logits, expected.logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("device", DEVICES)
def test_dropout_repeats_under_checkpointing(device: str, attention: str) -> None:
    """Catches masks that are drawn anew where a layer is recomputed, in a fused kernel's own random stream too."""
    losses, found = [], []
    for recompute in (None, "full", "selective"):
        config = GPT2.config(**GPT2.dropout(0.1, 0.1))
        model = GPT2.build(config=config, seed=0, attn_implementation=attention)
        model = model.double().to(device).train()
        if recompute is not None:
            model.activation_checkpointing_enable({"recompute": recompute})
        torch.manual_seed(3)
        loss = model(input_ids=IDS.to(device), labels=IDS.to(device)).loss
        loss.backward()
        losses.append(loss.detach())
        found.append(gradients(model))
    for loss, recomputed in zip(losses[1:], found[1:], strict=True):
        assert_agrees("loss", loss, losses[0])
        assert_all_agree("gradient", recomputed, found[0])


@pytest.mark.parametrize("device", DEVICES)
def test_the_fused_loss_in_bfloat16(device: str) -> None:
    """Catches chunks that are summed up in bfloat16."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32, device=device), torch.randn(V, 32, device=device) / 6
    target = torch.arange(64, device=device)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [tensor.to(torch.bfloat16).to(dtype).requires_grad_() for tensor in (hidden, weight)]
        loss = vocab_parallel_linear_cross_entropy(
            SINGLE, leaves[0], leaves[1], None, target, vocab_size=V, chunk_size=8
        )
        loss.backward()
        results.append((loss.detach(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)))
    for wide, narrow in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=0.02, atol=0.01 * float(wide.abs().max()))


def _step_of_a_rank(rank: int, directory: Path, device: str, tp_size: int) -> None:
    """A training step, with the loss and all gradients written by rank 0."""
    # Both ranks are on the first GPU. NCCL does not allow that, gloo does.
    os.environ.update(LOCAL_RANK="0", RANK=str(rank), WORLD_SIZE=str(tp_size))
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else "0"
    if tp_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=tp_size)
    model = GPT2.build(tp_size, config=GPT2.config(), seed=0).double()
    if tp_size == 1:
        model = model.to(device)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    loss = model.train()(input_ids=IDS.to(device), labels=LABELS.to(device)).loss
    loss.backward()
    found = {name: gradient.cpu() for name, gradient in gradients(model).items()}
    if rank == 0:
        torch.save((loss.detach().cpu(), found), directory / f"tp{tp_size}-{device}.pt")
    if tp_size > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]])
def test_two_ranks_on_one_device(tmp_path: Path, device: str) -> None:
    """Catches collectives that take a GPU's tensors before they are computed, and parts that stay on the CPU."""
    torch.multiprocessing.spawn(_step_of_a_rank, (tmp_path, device, 2), nprocs=2)
    torch.multiprocessing.spawn(_step_of_a_rank, (tmp_path, "cpu", 1), nprocs=1)
    loss, found = torch.load(tmp_path / f"tp2-{device}.pt")
    expected_loss, expected_gradients = torch.load(tmp_path / "tp1-cpu.pt")
    assert_agrees("loss", loss, expected_loss)
    assert_all_agree("gradient", found, expected_gradients)
