"""Sequence parallelism: the numbers of the stock model, though between the layers no rank has the whole sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronGPT2LMHeadModel
from hf_megatron.models.arguments import CACHE
from hf_megatron.partition import chunk_range
from hf_megatron.tensor_parallel import HiddenDropout, ReplicatedLayerNorm, local
from tests.models.collectives import Collective, Recorder
from tests.models.reference import (
    Batch,
    Pool,
    assert_agrees,
    assert_all_agree,
    assert_all_equal,
    assert_replicas_equal,
    assert_same_on_all_ranks,
    full_gradients,
    full_weights,
    layout,
    make_batch,
    rank,
    reference_loss,
    run_at,
    save_stock,
    token_ids,
)

StockDir = Callable[[str], Path]
Kernel = tuple[torch.dtype, str]  # dtype and attention implementation

B, H, LAYERS = 3, 48, 2
# Over 4 ranks 8 positions are 2 each, 9 are 3, 3, 3 and none, and 5 are 2, 2, 1 and none. 3 are not split over 4.
LENGTHS = (8, 9, 5, 3)


def _load(directory: Path, tp_size: int, *, sequence_parallel: bool = True, **options: Any) -> MegatronGPT2LMHeadModel:
    split = layout(tp_size, sequence_parallel=sequence_parallel)
    model: MegatronGPT2LMHeadModel = MegatronGPT2LMHeadModel.from_pretrained(
        directory, distributed_config=split, **options
    )
    return model


def _batch(padding: str, length: int) -> Batch:
    return {name: value[:, :length] for name, value in make_batch(padding).items()}


# ---------------------------------------------------------------------- the same numbers


def _compare_steps(
    directory: Path, tp_size: int, kernels: list[Kernel], paddings: tuple[str, ...], lengths: tuple[int, ...]
) -> None:
    """An evaluation and a step of AdamW for each combination.

    In float64 all of them are on the same weights as they develop; float32 would add up the rounding of all steps.
    """
    for dtype, attention in kernels:
        load: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
        for number, (padding, length) in enumerate(itertools.product(paddings, lengths)):
            if number == 0 or dtype == torch.float32:
                stock = GPT2LMHeadModel.from_pretrained(directory, **load).train()
                ours = _load(directory, tp_size, **load)
                optimizers = [
                    torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, weight_decay=0.1)
                    for model in (stock, ours)
                ]
            context = f"{dtype} {attention}, padding {padding}, length {length}"
            batch = _batch(padding, length)
            labels = batch["labels"]
            valid = batch.get("attention_mask", torch.ones_like(labels)).bool()
            logits = stock(**{**batch, "labels": None}).logits
            loss = reference_loss(logits, labels)
            loss.backward()
            with torch.no_grad():
                outputs = ours.eval()(**batch)
            assert_agrees(f"{context}: loss in evaluation", outputs.loss, loss)
            assert_agrees(f"{context}: logits", outputs.logits[valid], logits[valid])
            assert_same_on_all_ranks(f"{context}: logits", outputs.logits)
            outputs = ours.train()(**batch)
            outputs.loss.backward()
            assert_agrees(f"{context}: loss", outputs.loss, loss)
            assert_all_agree(f"{context}: gradient", full_gradients(ours), full_gradients(stock))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert_all_agree(f"{context}: weight", full_weights(ours), full_weights(stock))
        assert_replicas_equal(ours)


@pytest.mark.parametrize(("variant", "tp_size"), [("base", 4), ("untied", 2)])
def test_training_equals_stock(pool: Pool, stock_dir: StockDir, variant: str, tp_size: int) -> None:
    """Catches gradients that stay partial sums or are summed twice, and positions mixed up in uneven parts."""
    kernels: list[Kernel] = [(torch.float64, "sdpa")]
    pool(tp_size).run(_compare_steps, stock_dir(variant), tp_size, kernels, ("right",), LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [2, 3, 4])
@pytest.mark.parametrize("variant", ["base", "untied", "uneven_n_inner", "inverse_layer_scaling"])
def test_every_combination_equals_stock(pool: Pool, stock_dir: StockDir, variant: str, tp_size: int) -> None:
    """Catches what only one combination of dtype, kernel, padding and length gets wrong."""
    every_remainder = (9, 8, 7, 6)  # at every degree
    directory, paddings, some = stock_dir(variant), ("none", "right", "left"), (every_remainder[tp_size - 1],)
    for kernel, lengths in (((torch.float64, "sdpa"), every_remainder), ((torch.float64, "eager"), some)):
        pool(tp_size).run(_compare_steps, directory, tp_size, [kernel], paddings, lengths, timeout=250)
    single: list[Kernel] = [(torch.float32, "sdpa"), (torch.float32, "eager")]
    pool(tp_size).run(_compare_steps, directory, tp_size, single, ("left",), (9, 5), timeout=250)


def _accumulate(directory: Path, tp_size: int, checkpointing: bool) -> None:
    """Two micro-batches of different lengths, both forwards before the first backward."""
    stock = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float64)
    ours = _load(directory, tp_size, dtype=torch.float64).train()
    if checkpointing:
        ours.activation_checkpointing_enable()
    batches = [_batch("right", 9), _batch("none", 6)]
    for batch in batches:
        reference_loss(stock(**{**batch, "labels": None}).logits, batch["labels"], num_items_in_batch=40).backward()
    for loss in [ours(**batch, num_items_in_batch=40).loss for batch in batches]:
        loss.backward()
    assert_all_agree("gradient", full_gradients(ours), full_gradients(stock))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_add_up(pool: Pool, stock_dir: StockDir, checkpointing: bool) -> None:
    """Catches gradients made whole once more with each micro-batch, and a call's length that outlives the call."""
    pool(2).run(_accumulate, stock_dir("base"), 2, checkpointing)


def _train_with_frozen_parts(directory: Path) -> None:
    stock = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float64)
    ours = _load(directory, 2, dtype=torch.float64).train()
    for model in (stock, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("c_fc.weight" in name or "ln_2.bias" in name)
    batch = _batch("right", 9)
    reference_loss(stock(**{**batch, "labels": None}).logits, batch["labels"]).backward()
    ours(**batch).loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (stock, ours)]
    assert_all_agree("gradient", {n: g.full_tensor() for n, g in gradients[1].items()}, gradients[0])


def test_frozen_parameters(pool: Pool, stock_dir: StockDir) -> None:
    """Catches a collective that waits for a gradient nobody computes."""
    pool(2).run(_train_with_frozen_parts, stock_dir("base"))


def _gradient_of_embeddings(directory: Path, sequence_parallel: bool) -> torch.Tensor:
    model = _load(directory, 2, sequence_parallel=sequence_parallel, dtype=torch.float64).train()
    embeddings = torch.randn(B, 9, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    model(inputs_embeds=embeddings, labels=token_ids()).loss.backward()
    assert embeddings.grad is not None
    return embeddings.grad


def test_gradient_of_given_embeddings(pool: Pool, stock_dir: StockDir) -> None:
    """Catches a gradient that covers this rank's positions only."""
    expected = pool(2).run(_gradient_of_embeddings, stock_dir("base"), False)[0]
    for gradient in pool(2).run(_gradient_of_embeddings, stock_dir("base"), True):
        assert_agrees("gradient", gradient, expected)


def _autocast(directory: Path, sequence_parallel: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = _load(directory, 2, sequence_parallel=sequence_parallel).train()
    with torch.autocast("cpu", torch.bfloat16), Recorder() as recorder:
        loss = model(**_batch("right", 8)).loss
    loss.backward()
    if sequence_parallel:
        gathered = [size for name, size in recorder.seen if name == "_allgather_base_"]
        assert gathered[:4] == [B * 8 * H * 2] * 4, "layers send float32"
    return loss.detach(), full_gradients(model)


def test_autocast(pool: Pool, stock_dir: StockDir) -> None:
    """Catches products in float32 where autocast asks for less, and gradients in another dtype than their weight."""
    expected, expected_gradients = pool(2).run(_autocast, stock_dir("base"), False)[0]
    for loss, gradients in pool(2).run(_autocast, stock_dir("base"), True):
        assert loss.item() == pytest.approx(expected.item(), rel=0.02)
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            scale = expected_gradients[name].abs().max().item() + 0.01
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=0.1 * scale)


# ---------------------------------------------------------------------- dropout


@dataclass
class _Steps:
    """Two training steps: their losses, the sum of their gradients, and the random state they leave behind."""

    losses: torch.Tensor
    gradients: dict[str, torch.Tensor]
    random_state: torch.Tensor


def _train_with_dropout(
    directory: Path, tp_size: int, attention: str, sequence_parallel: bool, checkpointing: dict[str, Any] | None = None
) -> _Steps:
    torch.manual_seed(1 + rank())  # loading puts the ranks in step with rank 0
    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": attention}
    model = _load(directory, tp_size, sequence_parallel=sequence_parallel, **options).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)
    losses = []
    for padding, length in (("right", 9), ("none", 8)):
        loss = model(**_batch(padding, length)).loss
        loss.backward()
        losses.append(loss.detach())
    assert_same_on_all_ranks("random state", torch.get_rng_state())
    return _Steps(torch.stack(losses), full_gradients(model), torch.get_rng_state())


@pytest.fixture(scope="module")
def dropout_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model with dropout everywhere."""
    return save_stock(tmp_path_factory.mktemp("dropout"), attn_pdrop=0.3, resid_pdrop=0.1, embd_pdrop=0.2)


@pytest.mark.parametrize(("attention", "tp_size"), [("eager", 4), ("sdpa", 2)])
def test_dropout_is_that_of_one_process(pool: Pool, dropout_dir: Path, attention: str, tp_size: int) -> None:
    """Catches masks drawn for this rank's positions: other ones than without the switch, or the same on all ranks."""
    (expected,) = run_at(pool, 1, _train_with_dropout, dropout_dir, 1, attention, False)
    for steps in run_at(pool, tp_size, _train_with_dropout, dropout_dir, tp_size, attention, True):
        assert_agrees("losses", steps.losses, expected.losses)
        assert_all_agree("gradient", steps.gradients, expected.gradients)
        assert torch.equal(steps.random_state, expected.random_state)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(pool: Pool, dropout_dir: Path, reentrant: bool, recompute: str) -> None:
    """Catches a recomputation on other positions or with other masks than the forward pass had."""
    expected = pool(2).run(_train_with_dropout, dropout_dir, 2, "sdpa", True)[0]
    options = {"use_reentrant": reentrant, "recompute": recompute}
    for steps in pool(2).run(_train_with_dropout, dropout_dir, 2, "sdpa", True, options):
        assert torch.equal(steps.losses, expected.losses)
        assert_all_equal(steps.gradients, expected.gradients)
        assert torch.equal(steps.random_state, expected.random_state)


# ---------------------------------------------------------------------- what is kept, and what is sent


def _kept_elements(directory: Path, tp_size: int, sequence_parallel: bool, length: int) -> int:
    """Elements kept for the backward pass, between embedding and head, in tensors of hidden size."""
    model = _load(directory, tp_size, sequence_parallel=sequence_parallel).train()
    weights = {local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1] == H and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    seen: list[int] = []
    for module in model.modules():
        if isinstance(module, (ReplicatedLayerNorm, HiddenDropout)):
            module.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].shape[1]))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.transformer(token_ids(B, length))
    start, stop = chunk_range(length, tp_size, rank()) if sequence_parallel else (0, length)
    assert seen == [stop - start] * (2 + 4 * LAYERS), f"norms and dropout saw {seen} positions"
    return sum(kept.values())


@pytest.mark.parametrize("length", [8, 9])
def test_what_lies_between_the_layers_is_kept_once(pool: Pool, dropout_dir: Path, length: int) -> None:
    """Catches the gathered input of a product kept for its backward pass, which would cost what the split saves."""
    split, whole = (sum(pool(2).run(_kept_elements, dropout_dir, 2, is_split, length)) for is_split in (True, False))
    # The inputs of all norms and of the products behind them, and the masks of all dropout.
    assert split == B * length * H * (4 * LAYERS + 1 + 2 * LAYERS + 1)
    assert whole == 2 * split


def _record_steps(
    directory: Path, tp_size: int, length: int, recompute: str | None = None
) -> dict[str, list[Collective]]:
    model = _load(directory, tp_size, attn_implementation="eager").train()
    if recompute is not None:
        model.activation_checkpointing_enable({"recompute": recompute})
    optimizer = torch.optim.AdamW(model.parameters())
    batch = _batch("right", length)
    recorders = {phase: Recorder() for phase in ("forward", "backward", "optimizer", "evaluation")}
    for _ in range(2):  # the second step has the optimizer's state to deal with
        for recorder in recorders.values():
            recorder.seen.clear()
        with recorders["forward"]:
            outputs = model(**batch)
        with recorders["backward"]:
            outputs.loss.backward()
        with recorders["optimizer"]:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad(), recorders["evaluation"]:
        model.eval()(batch["input_ids"])
    return {phase: recorder.seen for phase, recorder in recorders.items()}


def _expected_collectives(tp_size: int, length: int) -> dict[str, Collective]:
    """Names and bytes; what is gathered or scattered is filled up to a multiple of the degree."""
    rows = -(-length // tp_size)
    return {
        "all-reduce": ("allreduce_", B * length * H * 4),
        "gather": ("_allgather_base_", B * rows * tp_size * H * 4),
        "scatter": ("_reduce_scatter_base_", B * rows * H * 4),
        # Both norms' weights and biases, and the biases of c_attn, whole, and of the two c_proj.
        "block's bucket": ("allreduce_", (4 + 3 + 2) * H * 4),
        "last norm's bucket": ("allreduce_", 2 * H * 4),
    }


@pytest.mark.parametrize(("tp_size", "length"), [(2, 8), (2, 9), (4, 9)])
def test_collectives_of_a_training_step(pool: Pool, stock_dir: StockDir, tp_size: int, length: int) -> None:
    """Catches an all-reduce that is left, a bucket per parameter, and anything sent twice."""
    of = _expected_collectives(tp_size, length)
    gather, scatter = of["gather"], of["scatter"]
    labelled = int((_batch("right", length)["labels"][:, 1:] != -100).sum())
    statistics = ("_allgather_base_", 3 * tp_size * labelled * 4)
    vocabulary = ("_allgather_base_", -(-131 // tp_size) * tp_size * B * length * 4)
    body = [of["all-reduce"], *[gather, scatter] * 2 * LAYERS, gather]
    expected = {
        "forward": [*body, statistics],
        # The head, then per half of a layer: g-bar of its second product, then of its first the input once more, and g.
        "backward": [
            scatter,
            of["last norm's bucket"],
            *[*[gather, gather, scatter] * 2, of["block's bucket"]] * LAYERS,
            gather,
        ],
        "optimizer": [],
        "evaluation": [*body, vocabulary],
    }
    seen = pool(tp_size).run(_record_steps, stock_dir("base"), tp_size, length)
    assert seen == [expected] * tp_size


def test_checkpointing_repeats_only_the_recomputed_part(pool: Pool, stock_dir: StockDir) -> None:
    """Catches recomputation that sends more than it has to: per layer all but the output of the MLP."""
    of = _expected_collectives(2, 9)
    gather, scatter = of["gather"], of["scatter"]
    again = [gather, scatter, gather]  # g, g-bar and g, when the first of the layer's tensors is asked for
    layer = [gather, *again, gather, scatter, gather, gather, scatter, of["block's bucket"]]
    (seen, _) = pool(2).run(_record_steps, stock_dir("base"), 2, 9, "full")
    assert seen["backward"] == [scatter, of["last norm's bucket"], *layer * LAYERS, gather]


def test_selective_recomputation_sends_nothing(pool: Pool, stock_dir: StockDir) -> None:
    """Catches a recomputation that gathers positions again, of which attention already had all."""
    expected = pool(2).run(_record_steps, stock_dir("base"), 2, 9)
    assert pool(2).run(_record_steps, stock_dir("base"), 2, 9, "selective") == expected


def _record_decoding(directory: Path, sequence_parallel: bool) -> list[Collective]:
    model = _load(directory, 2, sequence_parallel=sequence_parallel)
    cache = model(token_ids(B, 6), use_cache=True)[CACHE]
    recorder = Recorder()
    with recorder:
        model(token_ids(B, 1), **{CACHE: cache}, use_cache=True)
    return recorder.seen


def test_decoding_sends_what_it_sends_without(pool: Pool, stock_dir: StockDir) -> None:
    """Catches a single position split over the ranks: twice the collectives, and nothing to gain."""
    expected = pool(2).run(_record_decoding, stock_dir("base"), False)
    assert pool(2).run(_record_decoding, stock_dir("base"), True) == expected
    assert len(expected[0]) == 1 + 2 * LAYERS + 1


# ---------------------------------------------------------------------- compiling and saving


def _compile(directory: Path) -> None:
    torch.compiler.reset()
    model = _load(directory, 2, dtype=torch.float64).train()
    steps = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        model.zero_grad()
        loss = forward(**_batch("none", 9)).loss
        loss.backward()
        steps.append((loss.detach(), full_gradients(model)))
    (loss, gradients), (compiled_loss, compiled_gradients) = steps
    assert_agrees("loss", compiled_loss, loss)
    assert_all_agree("gradient", compiled_gradients, gradients)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler uses parts of torch that torch deprecates
def test_a_model_is_one_graph_that_equals_eager(pool: Pool, dropout_dir: Path) -> None:
    """Catches a graph break, and a compiled step with other masks, loss or gradients."""
    pool(2).run(_compile, dropout_dir, timeout=280)


def _save(directory: Path, destination: Path) -> None:
    config = DistributedConfig(tp_size=2, enable_sequence_parallel=True)
    model = MegatronGPT2LMHeadModel.from_pretrained(directory, distributed_config=config)
    assert model.sequence_parallel
    model.save_pretrained(destination)


def test_what_is_saved_does_not_know(pool: Pool, stock_dir: StockDir, tmp_path: Path) -> None:
    """Catches a switch of this run that travels with the weights."""
    pool(2).run(_save, stock_dir("base"), tmp_path)
    assert "sequence_parallel" not in (tmp_path / "config.json").read_text()
    again = MegatronGPT2LMHeadModel.from_pretrained(tmp_path)
    assert not again.sequence_parallel
    assert_all_equal(full_weights(again), full_weights(GPT2LMHeadModel.from_pretrained(stock_dir("base"))))


def test_one_process_does_not_split(stock_dir: StockDir) -> None:
    """Catches the switch asking for collectives, which need a process group, in a plain process."""
    config = DistributedConfig(enable_sequence_parallel=True)
    model = MegatronGPT2LMHeadModel.from_pretrained(stock_dir("base"), distributed_config=config).train()
    model(**_batch("right", 9)).loss.backward()
