"""--verify runs a Megatron-LM checkpoint by Megatron's own equations, and finds what no comparison of tensors would."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_megatron
from hf_megatron.checkpoint import LazyTensor
from hf_megatron.partition import Box
from hf_megatron_conversion import convert, logits, sample, verify
from hf_megatron_conversion.formats import read_model
from hf_megatron_conversion.formats.base import SourceOptions
from hf_megatron_conversion.formats.megatron_lm import arguments, config, layout, merge, reader
from hf_megatron_conversion.megatron_forward import megatron_outputs
from hf_megatron_conversion.tensors import Reshaped
from tests.conversion.checkpoints import read_config, read_tensors, write_hub
from tests.conversion.commands import Commands
from tests.conversion.megatron_lm.generator import HEADS, VOCAB, Variant, forward, inputs, make_weights, write

_GPT = Variant(gelu="fused")
_BERT = Variant(kind="bert", gelu="fused")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", _GPT)


@pytest.fixture
def hub(tmp_path: Path, source: Path) -> Path:
    """The same as a hub directory."""
    convert(source, tmp_path / "hub", to="hub", vocab_size=VOCAB)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    "variant",
    [
        Variant(version=None, names="first"),
        Variant(version=1.0, names="first", tp=4),
        Variant(gelu="fused", tp=4, is_untied=True),
        Variant(pp=2),
        Variant(kind="bert", gelu="fused"),
        Variant(kind="bert", is_post=True, version=2.0, names="first", eps=1e-3),
        Variant(kind="bert", has_binary_head=False, gelu="openai", names="second"),
        Variant(kind="bert", gelu="fused", names="core"),
    ],
)
def test_the_equations(tmp_path: Path, variant: Variant) -> None:
    """Catches a reference that is wrong itself: it equals the independent one, computed without any shards."""
    weights = make_weights(variant)
    model = read_model(write(tmp_path / "source", variant, weights), SourceOptions(vocab_size=VOCAB))
    ids, mask, types = inputs(variant)
    assert isinstance(model.opened, reader.MegatronCheckpoint)
    computed = megatron_outputs(model.opened, ids[:1], types[:1])
    for a, b in zip(computed, forward(variant, weights, ids[:1], mask[:1], types[:1]), strict=True):
        assert (a - b).abs().max() < 1e-7


def test_a_right_conversion_passes(tmp_path: Path, source: Path, command: Commands) -> None:
    """Catches figures missing from the report, or two runs on different ids."""
    hub = tmp_path / "hub"
    code, result, _ = command.run("convert", source, hub, "--to", "hub", "--vocab-size", VOCAB, "--verify")
    assert (code, result["verified"], result["argmax_agreement"]) == (0, True, 1.0)
    assert 0 <= result["max_logit_diff"] < 1e-7
    assert result["loss_source"] == pytest.approx(result["loss_destination"], abs=1e-7)
    code, result, _ = command.run("verify", source, hub, "--logits")
    assert (code, result["equal"]) == (0, True)
    assert result["loss_a"] == pytest.approx(result["loss_b"], abs=1e-7)


def _wrong_order(shards: Any, size: Any, version: Any, original: Any = merge.fused_qkv) -> Any:
    return original(shards, size, 0.0)


def _wrong_eps(*arguments: Any, original: Any = config._numerics) -> Any:
    return {**original(*arguments), "layer_norm_epsilon": 1e-12}


_MISTAKES: list[tuple[Any, str, Any]] = [
    (reader, "fused_qkv", _wrong_order),
    (config, "_numerics", _wrong_eps),
    (config, "activations", lambda *_, **__: arguments.Activations("gelu", "gelu")),
]


@pytest.mark.parametrize("mistake", _MISTAKES, ids=lambda mistake: mistake[1])
def test_a_planted_mistake_fails(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any) -> None:
    """Catches a --verify that compares the reader with itself: each mistake is made on both sides of the tensors."""
    monkeypatch.setattr(*mistake)
    conversion = convert(source, tmp_path / "hub", to="hub", vocab_size=VOCAB, verify=True)
    assert conversion.verified is False
    assert conversion.max_logit_diff is not None
    assert conversion.max_logit_diff > 1e-6
    assert not (tmp_path / "hub").exists()


def test_a_planted_mistake_of_the_writer_fails(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a Megatron-LM checkpoint that reads back as it was written, in an order Megatron-LM does not use."""

    def one_after_the_other(parts: Sequence[LazyTensor], head_dim: int) -> Reshaped:
        rows, *rest = parts[0].shape
        pieces = [
            replace(piece, box=Box((which * rows, *piece.box.offset[1:]), piece.box.shape))
            for which, part in enumerate(parts)
            for piece in part.pieces
        ]
        shape = (3 * rows, *rest)
        return Reshaped(LazyTensor(parts[0].name, parts[0].dtype, shape, tuple(pieces)), shape)

    monkeypatch.setattr(layout, "stacked", one_after_the_other)
    # A reader with the same idea of the order, so that the tensors come back as they were.
    monkeypatch.setattr(*_MISTAKES[0])
    assert convert(hub, tmp_path / "m", to="megatron-lm", tp_size=2, verify=True).verified is False


def test_a_config_that_contradicts_the_arguments_is_found(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a given config.json believed against the arguments without a word and without a check."""
    file = tmp_path / "config.json"
    for name, value in (("layer_norm_epsilon", 1e-3), ("activation_function", "gelu")):
        file.write_text(json.dumps({"model_type": "gpt2", name: value}))
        conversion = convert(source, tmp_path / "hub", to="hub", vocab_size=VOCAB, config=file, verify=True)
        assert conversion.verified is False
        assert f"The given config.json has {name}={value}" in caplog.text


@pytest.mark.parametrize("entry", [{"layer_norm_epsilon": 1e-12}, {"activation_function": "gelu"}])
def test_verify_finds_a_changed_config(source: Path, hub: Path, entry: dict[str, Any]) -> None:
    """Catches a comparison of two checkpoints that looks at their tensors only."""
    write_hub(hub, read_tensors(hub), {**read_config(hub), **entry})
    result = verify(source, hub, logits=True)
    assert not result.equal
    assert "logits" in result.mismatched


def test_verify_finds_a_wrong_order(source: Path, hub: Path) -> None:
    """Catches logits that are not compared where the tensors are known to differ."""
    name, tensors = "transformer.h.0.attn.c_attn.weight", read_tensors(hub)
    tensors[name] = tensors[name].view(32, 3, HEADS, -1).transpose(1, 2).reshape(32, -1).contiguous()
    write_hub(hub, tensors, read_config(hub))
    result = verify(source, hub, logits=True)
    assert set(result.mismatched) == {name, "logits"}
    assert result.max_logit_diff is not None
    assert result.max_logit_diff > 0.1


def test_verify_learns_what_the_files_do_not_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches padding, or a checkpoint without arguments, that makes two equal models differ."""
    old = Variant(version=None, names="flat", has_arguments=False, gelu="openai")
    source = write(tmp_path / "source", old)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "gpt2", "n_head": HEADS}))
    convert(source, tmp_path / "hub", to="hub", vocab_size=VOCAB, config=file)
    assert verify(source, tmp_path / "hub", logits=True).equal
    assert verify(tmp_path / "hub", source).equal
    padded = write(tmp_path / "padded", _GPT)
    convert(padded, tmp_path / "m", to="megatron-lm", tp_size=4, vocab_size=VOCAB)
    caplog.clear()
    assert verify(padded, tmp_path / "m", logits=True).equal
    assert verify(tmp_path / "m", padded).equal
    assert "padding" not in caplog.text


def test_what_the_stock_class_cannot_express(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a BERT with two activations that loses one without a word, in the stock export or in ours."""
    caplog.set_level(logging.INFO)
    weights = make_weights(_BERT)
    source = write(tmp_path / "source", _BERT, weights)
    ids, mask, types = inputs(_BERT)
    expected = forward(_BERT, weights, ids, mask, types)[0]

    def gap(model_class: Any, directory: Path) -> float:
        model = model_class.from_pretrained(directory, dtype=torch.float64).eval()
        with torch.no_grad():
            computed = model(ids, attention_mask=mask, token_type_ids=types).prediction_logits
        return float((computed - expected)[mask.bool()].abs().max())

    ours: Any = hf_megatron.MegatronBertForPreTraining
    for model_type in ("stock", "megatron"):
        caplog.clear()
        directory = tmp_path / model_type
        conversion = convert(source, directory, to="hub", vocab_size=VOCAB, model_type=model_type, verify=True)
        assert conversion.verified is True
        told = {
            "applies it in the masked-LM head too, where this model has 'gelu' (up to 4.7e-4": caplog.text,
            "Run as the stock class": caplog.text,
            "differs in stock transformers": (directory / "README.md").read_text(),
        }
        assert {part: part in text for part, text in told.items()} == dict.fromkeys(told, model_type == "stock")
        assert gap(ours, directory) < 1e-7
        # Leaving again, our class says it too.
        caplog.clear()
        ours.from_pretrained(directory, dtype=torch.float64).save_pretrained(tmp_path / f"{model_type}2", stock=True)
        assert "applies it in the masked-LM head too" in caplog.text
    assert 1e-5 < gap(transformers.MegatronBertForPreTraining, tmp_path / "stock") < 1e-2


def test_ids_are_a_text_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    """Catches a tokenizer that is not asked, ids it does not have, and a broken one that stops the verification."""
    words = sorted(set(re.findall(r"\w+|[,.:]", sample._TEXT.lower())))
    (tmp_path / "t").mkdir()
    (tmp_path / "t/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    ids = sample.sample_ids([tmp_path, tmp_path / "t"], 200, 30)
    assert (ids.shape, int(ids[0, 0])) == ((1, 30), 2)
    assert ids.max() >= 5
    random = sample.sample_ids([tmp_path / "t"], 6, 30)
    assert random.max() < 6
    (tmp_path / "t/tokenizer.json").write_text("{}")
    assert torch.equal(sample.sample_ids([tmp_path / "t"], 6, 30), random)


def test_losses_are_those_of_the_classes(hub: Path) -> None:
    """Catches a loss of another kind than the class's own."""
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(hub, dtype=torch.float64).eval()
    result = logits.agreement(read_model(hub), read_model(hub))
    ids = sample.sample_ids([], VOCAB, 24)
    with torch.no_grad():
        # The stock loss is computed in float32.
        assert result.losses[0] == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-6)
