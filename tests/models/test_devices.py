"""The same step on a GPU as on a CPU. `make test` has the CPU's half."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from hf_megatron import MegatronBertConfig, MegatronBertForMaskedLM, MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.tensor_parallel import SINGLE, vocab_parallel_linear_cross_entropy
from tests.models.reference import assert_agrees, assert_all_agree, full_gradients, layout

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
V, S = 131, 16
IDS = torch.arange(2 * S).view(2, S)
LABELS = torch.where(IDS % 3 == 0, IDS, -100)


def _pair(architecture: str, device: str) -> tuple[Any, Any]:
    """A stock model and ours with the same weights, in float64 and without dropout."""
    torch.manual_seed(0)
    if architecture == "gpt2":
        sizes = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": S}
        dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        stock: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout))
        ours: Any = MegatronGPT2LMHeadModel(MegatronGPT2Config(**sizes, **dropout))
    else:
        sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 64, "max_position_embeddings": S}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        stock = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **dropout))
        ours = MegatronBertForMaskedLM(MegatronBertConfig(**sizes, **dropout, layernorm_placement="post"))
    own = ours.state_dict().keys()
    ours.load_state_dict({name: value for name, value in stock.state_dict().items() if name in own})
    return stock.double().to(device), ours.double().to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_a_step_equals_stock(architecture: str, device: str) -> None:
    """Catches a kernel that is used on one kind of device and computes something else."""
    stock, ours = _pair(architecture, device)
    ids, labels = IDS.to(device), LABELS.to(device)
    expected = stock.train()(input_ids=ids).logits
    pairs = (expected[:, :-1], labels[:, 1:]) if architecture == "gpt2" else (expected, labels)
    loss = nn.functional.cross_entropy(pairs[0].flatten(0, 1), pairs[1].flatten())
    loss.backward()
    actual = ours.train()(input_ids=ids, labels=labels).loss
    actual.backward()
    assert_agrees("loss", actual, loss)
    gradients = full_gradients(ours)
    known = {name: gradient for name, gradient in full_gradients(stock).items() if name in gradients}
    assert_all_agree("gradient", gradients, known)
    assert_agrees("logits", ours.eval()(input_ids=ids).logits, stock.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("device", DEVICES)
def test_dropout_repeats_under_checkpointing(device: str, attention: str) -> None:
    """Catches masks that are drawn anew where a layer is recomputed, in a fused kernel's own random stream too."""
    losses, gradients = [], []
    for recompute in (None, "full", "selective"):
        config = MegatronGPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=S)
        model = MegatronGPT2LMHeadModel.from_config(config, seed=0, attn_implementation=attention)
        model = model.double().to(device).train()
        if recompute is not None:
            model.activation_checkpointing_enable({"recompute": recompute})
        torch.manual_seed(3)
        loss = model(input_ids=IDS.to(device), labels=IDS.to(device)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(full_gradients(model))
    for loss, recomputed in zip(losses[1:], gradients[1:], strict=True):
        assert_agrees("loss", loss, losses[0])
        assert_all_agree("gradient", recomputed, gradients[0])


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
    sizes = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": S}
    config = MegatronGPT2Config(**sizes, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    model: Any = MegatronGPT2LMHeadModel.from_config(config, distributed_config=layout(tp_size), seed=0).double()
    if tp_size == 1:
        model = model.to(device)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    loss = model.train()(input_ids=IDS.to(device), labels=LABELS.to(device)).loss
    loss.backward()
    gradients = {name: gradient.cpu() for name, gradient in full_gradients(model).items()}
    if rank == 0:
        torch.save((loss.detach().cpu(), gradients), directory / f"tp{tp_size}-{device}.pt")
    if tp_size > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]])
def test_two_ranks_on_one_device(tmp_path: Path, device: str) -> None:
    """Catches collectives that take a GPU's tensors before they are computed, and parts that stay on the CPU."""
    torch.multiprocessing.spawn(_step_of_a_rank, (tmp_path, device, 2), nprocs=2)
    torch.multiprocessing.spawn(_step_of_a_rank, (tmp_path, "cpu", 1), nprocs=1)
    loss, gradients = torch.load(tmp_path / f"tp2-{device}.pt")
    expected_loss, expected_gradients = torch.load(tmp_path / "tp1-cpu.pt")
    assert_agrees("loss", loss, expected_loss)
    assert_all_agree("gradient", gradients, expected_gradients)
