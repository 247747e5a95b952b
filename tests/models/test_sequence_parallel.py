"""Sequence parallelism beyond numbers, dropout and collectives, which the tests of these try with and without it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.distributed import DistributedConfig

from hf_megatron.errors import UnsupportedError
from hf_megatron.partition import chunk_range
from hf_megatron.tensor_parallel import HiddenDropout, ReplicatedLayerNorm, local
from tests.live import on_live_ranks
from tests.models.architectures import ARCHITECTURES, BERTS, GPT2, LAYERS, B, H, ModelCase, S, StockDir, token_ids
from tests.models.collectives import Recorder
from tests.models.reference import Pool, assert_agrees, assert_all_agree, gradients, reference_loss


@pytest.mark.parametrize(("checkpointing", "trained"), [(False, ""), (True, ""), (False, r"c_fc\.weight|ln_2\.bias")])
@on_live_ranks(2)
def test_micro_batches_add_up(stock_dir: StockDir, checkpointing: bool, trained: str) -> None:
    """Catches gradients summed once more per micro-batch, a length that outlives its call, and a sum of no gradient."""
    stock = GPT2.load_stock(stock_dir(), dtype=torch.float64)
    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    ours = GPT2.load(stock_dir(), 2, sequence_parallel=True, **options).train()
    for name, parameter in [*stock.named_parameters(), *ours.named_parameters()]:
        parameter.requires_grad_(re.search(trained, name) is not None)
    if checkpointing:
        ours.activation_checkpointing_enable()
    batches = [GPT2.batch(None, "right", 9), GPT2.batch(None, "none", 6)]
    for batch in batches:
        reference_loss(stock(**{**batch, "labels": None}).logits, batch["labels"], num_items_in_batch=40).backward()
    for loss in [ours(**batch, num_items_in_batch=40).loss for batch in batches]:
        loss.backward()
    assert_all_agree("gradient", gradients(ours), gradients(stock))


@on_live_ranks(2)
def test_gradient_of_given_embeddings(stock_dir: StockDir) -> None:
    """Catches a gradient that covers this rank's positions only."""
    found: list[Any] = []
    for splits in (False, True):
        model = GPT2.load(stock_dir(), 2, sequence_parallel=splits, dtype=torch.float64).train()
        embeddings = torch.randn(B, S, H, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
        model(inputs_embeds=embeddings, labels=token_ids()).loss.backward()
        found.append(embeddings.grad)
    assert_agrees("gradient", found[1], found[0])


@on_live_ranks(2)
def test_autocast(stock_dir: StockDir) -> None:
    """Catches products in float32 where autocast asks for less, and gradients in another dtype than their weight."""
    losses, found = [], []
    for splits in (False, True):
        model = GPT2.load(stock_dir(), 2, sequence_parallel=splits).train()
        with torch.autocast("cpu", torch.bfloat16), Recorder() as recorder:
            loss = model(**GPT2.batch(None, "right", 8)).loss
        loss.backward()
        losses.append(loss.item())
        found.append(gradients(model))
    gathered = [size for name, size in recorder.seen if name == "_allgather_base_"]
    assert gathered[:4] == [B * 8 * H * 2] * 4, "layers send float32"
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    for name, expected in found[0].items():
        assert found[1][name].dtype == torch.float32
        torch.testing.assert_close(found[1][name], expected, rtol=0, atol=0.1 * (expected.abs().max().item() + 0.01))


def _kept_elements(directory: Path, splits: bool, length: int) -> int:
    """Elements kept for the backward pass, between embedding and head, in tensors of hidden size."""
    model = GPT2.load(directory, 2, sequence_parallel=splits, **GPT2.dropout(0.3, 0.1)).train()
    weights = {local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1] == H and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    seen: list[int] = []
    dim = 0 if splits else 1
    for module in model.modules():
        if isinstance(module, (ReplicatedLayerNorm, HiddenDropout)):
            module.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].shape[dim]))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.transformer(token_ids(B, length))
    start, stop = chunk_range(length, 2, torch.distributed.get_rank()) if splits else (0, length)
    assert seen == [stop - start] * (2 + 4 * LAYERS), f"norms and dropout saw {seen} positions"
    return sum(kept.values())


@pytest.mark.parametrize("length", [8, 9])
def test_what_lies_between_the_layers_is_kept_once(pool: Pool, stock_dir: StockDir, length: int) -> None:
    """Catches the gathered input of a product kept for its backward pass, which would cost what the split saves."""
    split, whole = (sum(pool(2).run(_kept_elements, stock_dir(), is_split, length)) for is_split in (True, False))
    # The inputs of all norms and of the products behind them, and the masks of all dropout.
    assert split == B * length * H * (4 * LAYERS + 1 + 2 * LAYERS + 1)
    assert whole == 2 * split


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_one_process_does_not_split(stock_dir: StockDir, case: ModelCase) -> None:
    """Catches the switch asking for collectives, which need a process group, in a plain process."""
    config = DistributedConfig(enable_sequence_parallel=True)
    case.ours().from_pretrained(stock_dir(case), distributed_config=config).train()(**case.batch()).loss.backward()


def test_chunks_of_positions_are_refused() -> None:
    """Catches ranks that walk through different numbers of chunks and wait for each other forever."""
    config = BERTS[0].config(chunk_size_feed_forward=3)
    config.distributed_config = DistributedConfig(tp_size=2, enable_sequence_parallel=True)
    with pytest.raises(UnsupportedError, match="chunk_size_feed_forward=3 with enable_sequence_parallel=True"):
        BERTS[0].ours()(config)
