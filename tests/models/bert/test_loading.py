"""Loading: the spellings of stock directories, another head than the stored one, and what a rank reads."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_megatron import MegatronBertConfig, MegatronBertForMaskedLM, MegatronBertForPreTraining
from hf_megatron.architectures import BERT_POST
from hf_megatron.checkpoint import LazyTensor
from hf_megatron.errors import CheckpointFormatError, PartitionError
from hf_megatron.partition import Box
from tests.models.bert.reference import (
    HEADS,
    PLACEMENTS,
    TINY,
    BertDir,
    Tensors,
    our_class,
    save_stock_bert,
    stock_class,
)
from tests.models.reference import Pool, assert_all_equal, full_weights, layout, rank, run_at
from tests.tiers import quick

EMBEDDING = "bert.embeddings.word_embeddings.weight"
DECODER, BIAS = "cls.predictions.decoder", "cls.predictions.bias"


def _without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("bert."): value for name, value in tensors.items()}


def _old_buffers(tensors: Tensors) -> Tensors:
    return {**tensors, "bert.embeddings.position_ids": torch.arange(32)[None]}


def _gamma_and_beta(tensors: Tensors) -> Tensors:
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    return {old(name): value for name, value in tensors.items()}


def _copies_of_what_is_tied(tensors: Tensors) -> Tensors:
    return {
        **tensors,
        f"{DECODER}.weight": tensors[EMBEDDING].clone(),
        f"{DECODER}.bias": tensors[BIAS].clone(),
    }


def _copies_in_place_of_the_originals(tensors: Tensors) -> Tensors:
    kept = {name: value for name, value in tensors.items() if name not in (EMBEDDING, BIAS)}
    return {**kept, f"{DECODER}.weight": tensors[EMBEDDING], f"{DECODER}.bias": tensors[BIAS]}


def _everything_at_once(tensors: Tensors) -> Tensors:
    return _without_prefix(_gamma_and_beta(_old_buffers(_copies_of_what_is_tied(tensors))))


SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {
    spelling.__name__[1:]: spelling
    for spelling in (
        _without_prefix,
        _old_buffers,
        _gamma_and_beta,
        _copies_of_what_is_tied,
        _copies_in_place_of_the_originals,
        _everything_at_once,
    )
}


def _spell(stock: Path, directory: Path, spelling: Callable[[Tensors], Tensors]) -> None:
    directory.mkdir(exist_ok=True)
    shutil.copy(stock / "config.json", directory)
    tensors = spelling(load_file(stock / "model.safetensors"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _load(directories: list[Path], tp_size: int) -> list[Tensors]:
    loaded = []
    for directory in directories:
        model, info = MegatronBertForPreTraining.from_pretrained(
            directory, distributed_config=layout(tp_size), output_loading_info=True
        )
        assert not any(info.values()), f"{directory.name}: {info}"
        loaded.append(full_weights(model))
    return loaded


@pytest.mark.parametrize(
    ("placement", "tp_size"), quick(itertools.product(PLACEMENTS, (1, 2)), [("pre", 1), ("post", 2)])
)
def test_spellings_load(pool: Pool, bert_dir: BertDir, tmp_path: Path, placement: str, tp_size: int) -> None:
    """Catches parameters that are drawn at random because their names in the file are others."""
    for name, spelling in SPELLINGS.items():
        _spell(bert_dir(placement), tmp_path / name, spelling)
    expected = load_file(bert_dir(placement) / "model.safetensors")
    for loaded in run_at(pool, tp_size, _load, [tmp_path / name for name in SPELLINGS], tp_size):
        for name, weights in zip(SPELLINGS, loaded, strict=True):
            assert_all_equal(weights, expected)
            assert weights, name


def test_what_is_dropped_is_named(bert_dir: BertDir, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches tensors that vanish without a word."""
    name = "bert.embeddings.token_type_ids"
    _spell(bert_dir("post"), tmp_path, lambda tensors: {**tensors, name: torch.zeros(1, 32, dtype=torch.long)})
    with caplog.at_level(logging.WARNING):
        MegatronBertForPreTraining.from_pretrained(tmp_path)
    assert [message for message in caplog.messages if "dropped" in message and name in message]


def _refusal(directory: Path, tp_size: int) -> str:
    with pytest.raises(CheckpointFormatError) as caught:
        MegatronBertForPreTraining.from_pretrained(directory, distributed_config=layout(tp_size))
    return str(caught.value)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_another_decoder_than_the_tied_one_is_refused(
    pool: Pool, bert_dir: BertDir, tmp_path: Path, name: str, tp_size: int
) -> None:
    """Catches a trained decoder, or its bias alone, thrown away because the config says that it is tied."""

    def spelling(tensors: Tensors) -> Tensors:
        tensors = _copies_of_what_is_tied(tensors)
        tensors[f"{DECODER}.{name}"].view(-1)[-1] += 1e-6
        return tensors

    _spell(bert_dir("post"), tmp_path, spelling)
    for message in run_at(pool, tp_size, _refusal, tmp_path, tp_size):
        assert f"{DECODER}.{name}" in message
        assert '"tie_word_embeddings": false' in message


# ---------------------------------------------------------------- what is said while loading


class _Keeper(logging.Handler):
    """Keeps what is logged from WARNING upwards."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _messages(directories: dict[str, Path]) -> dict[str, list[str]]:
    """What is logged on this rank while each head is loaded from its own directory."""
    loggers = [logging.getLogger(name) for name in ("transformers", "hf_megatron")]
    messages = {}
    for head, directory in directories.items():
        keeper = _Keeper()
        for logger in loggers:
            logger.addHandler(keeper)
        our_class(head).from_pretrained(directory, distributed_config=layout(2))
        for logger in loggers:
            logger.removeHandler(keeper)
        messages[head] = keeper.messages
    return messages


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_whole_checkpoint_loads_without_a_word(pool: Pool, bert_dir: BertDir, placement: str) -> None:
    """Catches warnings that mean nothing, such as of a plan for the pooler in a model that has none."""
    directories = {head: bert_dir(placement, head) for head in HEADS}
    assert pool(2).run(_messages, directories) == [{head: [] for head in HEADS}] * 2


# ---------------------------------------------------------------- another head


def _load_another_head(head: str, directory: Path, tp_size: int) -> tuple[Tensors, dict[str, Any]]:
    torch.manual_seed(7 if rank() == 0 else 8)
    model, info = our_class(head).from_pretrained(
        directory, distributed_config=layout(tp_size), output_loading_info=True
    )
    return full_weights(model), info


@pytest.mark.parametrize(
    ("head", "placement"),
    quick(
        itertools.product((head for head in HEADS if head != "ForMaskedLM"), PLACEMENTS),
        [("ForPreTraining", "post"), ("ForQuestionAnswering", "pre"), ("Model", "pre")],
    ),
)
def test_another_head_is_put_on_the_stored_body(pool: Pool, bert_dir: BertDir, head: str, placement: str) -> None:
    """Catches a fresh head or pooler that every rank draws for itself, and a body that is not loaded under it."""
    directory = bert_dir(placement, "ForMaskedLM")
    ((expected, info),) = run_at(pool, 1, _load_another_head, head, directory, 1)
    _, stock_info = stock_class(placement, head).from_pretrained(directory, output_loading_info=True)
    tied = {f"{DECODER}.weight", f"{DECODER}.bias"}  # parameters of the stock classes only
    assert info["missing_keys"] == stock_info["missing_keys"] - tied
    stored = load_file(directory / "model.safetensors")
    for name, value in expected.items():
        stored_name = name if head != "Model" else f"bert.{name}"
        if stored_name in stored:
            assert torch.equal(value, stored[stored_name]), name
        else:
            assert name in info["missing_keys"]
    for weights, rank_info in run_at(pool, 2, _load_another_head, head, directory, 2):
        assert_all_equal(weights, expected)
        assert rank_info["missing_keys"] == info["missing_keys"]


# ---------------------------------------------------------------- slices


def _check_reads(directory: Path, tp_size: int) -> None:
    reads: dict[str, list[Box]] = {}
    read = LazyTensor.read

    def recording(self: LazyTensor, box: Box | None = None) -> torch.Tensor:
        reads.setdefault(self.name, []).append(Box.whole(self.shape) if box is None else box)
        return read(self, box)

    with mock.patch.object(LazyTensor, "read", recording):
        model = MegatronBertForPreTraining.from_pretrained(directory, distributed_config=layout(tp_size))
    tensors = BERT_POST.tensors(model.config.to_dict(), BERT_POST.model_class("BertForPreTraining"))
    assert reads.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = list(tensor.spec.boxes(tensor.shape, tp_size, rank()))
        assert reads[name] == expected, f"{name}: read {reads[name]}, expected {expected}"
        held = model.get_parameter(name).to_local()
        assert held.untyped_storage().nbytes() == 4 * sum(box.numel for box in expected), f"{name} holds more"


@pytest.mark.parametrize(
    ("variant", "tp_size"), quick(itertools.product(("base", "untied"), (2, 4)), [("base", 4), ("untied", 2)])
)
def test_a_rank_reads_and_holds_its_slices_only(pool: Pool, bert_dir: BertDir, variant: str, tp_size: int) -> None:
    """Catches a rank that reads a tensor whole to keep a part, or holds a view of it."""
    run_at(pool, tp_size, _check_reads, bert_dir("post", "ForPreTraining", variant), tp_size)


# ---------------------------------------------------------------- refusals


def _load_refused(directory: Path) -> str:
    with pytest.raises(PartitionError) as caught:
        MegatronBertForMaskedLM.from_pretrained(directory, distributed_config=layout(2))
    with pytest.raises(PartitionError):
        MegatronBertForMaskedLM.from_config(MegatronBertConfig.from_pretrained(directory), distributed_config=layout(2))
    return str(caught.value)


def test_heads_that_do_not_divide(pool: Pool, tmp_path: Path) -> None:
    """Catches heads cut in two, and a refusal that comes after gigabytes were read: the weights are no file at all."""
    save_stock_bert(tmp_path, "pre", "ForMaskedLM", num_attention_heads=15, hidden_size=60)
    (tmp_path / "model.safetensors").write_text("not a weight file")
    for message in pool(2).run(_load_refused, tmp_path):
        assert message.startswith("num_attention_heads=15 is not divisible by tp_size=2; choose 1, 3, 5 or 15")


def test_sizes_that_are_left_out_are_those_of_the_stock_class(tmp_path: Path) -> None:
    """Catches a stock config.json completed with the other kind's sizes, or with this package's."""
    for model_type, hidden_size, placement in (("bert", 768, "post"), ("megatron-bert", 1024, "pre")):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}", "num_attention_heads": 4}}')
        config = MegatronBertConfig.from_pretrained(tmp_path)
        assert (config.hidden_size, config.layernorm_placement) == (hidden_size, placement)
        assert config.num_attention_heads == 4 != TINY["num_attention_heads"]
