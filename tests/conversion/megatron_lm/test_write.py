"""Stock models become Megatron-LM checkpoints: the files, the arguments, and the way back."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_megatron.errors import PartitionError, UnsupportedError
from hf_megatron_conversion import convert, tensors, verify
from tests.conversion.checkpoints import hub_bytes, read_config, save_stock
from tests.conversion.megatron_lm.generator import HEADS, VOCAB, Variant, write
from tests.repository import environment

_SMALL: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0}
_BERT = {**_SMALL, "hidden_size": 32, "num_attention_heads": HEADS, "max_position_embeddings": 24}
_BERT |= {"num_hidden_layers": 2, "intermediate_size": 48}
_GPT = {**_SMALL, "n_embd": 32, "n_head": HEADS, "n_positions": 24, "n_layer": 2, "n_inner": 48}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2}
_UNTIED = {**_GPT, "tie_word_embeddings": False, "activation_function": "gelu_fast"}
_STOCK = {
    "gpt2": (transformers.GPT2LMHeadModel, _GPT),
    "gpt2-untied": (transformers.GPT2LMHeadModel, _UNTIED),
    "bert": (transformers.BertForPreTraining, _BERT),
    "bert-tanh": (transformers.BertForPreTraining, {**_BERT, "hidden_act": "gelu_new"}),
    "megatron-bert": (transformers.MegatronBertForPreTraining, _BERT),
    "masked-lm": (transformers.MegatronBertForMaskedLM, _BERT),
    "classifier": (transformers.GPT2ForSequenceClassification, _GPT),
}


def _stock(directory: Path, kind: str, **changes: Any) -> Path:
    """Save a stock model whose tensors all differ."""
    model_class, entries = _STOCK[kind]
    return save_stock(directory, model_class=model_class, **{**entries, **changes})


def _load(directory: Path, rank: int) -> dict[str, Any]:
    """A rank's file as Megatron-LM would load it, with nothing but torch."""
    path = directory / f"release/mp_rank_{rank:02d}/model_optim_rng.pt"
    content: dict[str, Any] = torch.load(path, weights_only=False, map_location="cpu")
    return content


@pytest.mark.parametrize("kind", [kind for kind in _STOCK if kind != "classifier"])
def test_there_and_back_is_bit_exact(tmp_path: Path, kind: str) -> None:
    """Catches a cut, an order or a padding that writing and reading do not see alike, and entries lost on the way."""
    source = _stock(tmp_path / "hub", kind)
    convert(source, tmp_path / "m4", to="megatron-lm", tp_size=4, verify=True)
    convert(tmp_path / "m4", tmp_path / "tp", to="tp", tp_size=4)
    convert(tmp_path / "tp", tmp_path / "m8", to="megatron-lm", tp_size=8)
    convert(tmp_path / "m8", tmp_path / "m2", to="megatron-lm", tp_size=2, verify=True)
    assert convert(tmp_path / "m2", tmp_path / "back", to="hub", verify=True).verified
    assert hub_bytes(source) == hub_bytes(tmp_path / "back")
    before, after = read_config(source), read_config(tmp_path / "back")
    assert {name: after[name] for name in before if name in after} == before


def test_small_slices_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches large tensors, which are read in parts, of rows and of heads even, cut elsewhere than small ones."""
    source = _stock(tmp_path / "hub", "gpt2")
    for size in (2**24, 1000, 70):
        monkeypatch.setattr(tensors, "SLICE_BYTES", size)
        convert(source, tmp_path / f"m-{size}", to="megatron-lm", tp_size=4)
        convert(tmp_path / f"m-{size}", tmp_path / f"tp-{size}", to="tp", tp_size=2)
        convert(tmp_path / f"m-{size}", tmp_path / f"hub-{size}", to="hub")
        assert verify(source, tmp_path / f"tp-{size}").equal
        assert verify(source, tmp_path / f"hub-{size}").equal
        for rank in range(4):
            file = f"release/mp_rank_{rank:02d}/model_optim_rng.pt"
            assert (tmp_path / f"m-{size}" / file).read_bytes() == (tmp_path / f"m-{2**24}" / file).read_bytes()


@pytest.mark.parametrize("has_binary_head", [True, False])
def test_equals_what_megatron_lm_saves(tmp_path: Path, has_binary_head: bool) -> None:
    """Catches a file that only this package reads: names, nesting and bits are those of the independent generator."""
    for variant in (
        Variant(tp=4, gelu="fused", divisor=128),
        Variant(kind="bert", tp=4, divisor=128, has_binary_head=has_binary_head),
    ):
        directory = tmp_path / variant.kind
        source = write(directory / "source", variant)
        convert(source, directory / "hub", to="hub", vocab_size=VOCAB)
        convert(directory / "hub", directory / "written", to="megatron-lm", tp_size=4)
        for rank in range(4):
            expected = torch.load(source / f"iter_0001000/mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=False)
            written = _load(directory / "written", rank)
            a, b = _flat(expected["model"]), _flat(written["model"])
            assert set(a) == set(b)
            for name, tensor in a.items():
                rows = _real_rows(name, tensor, rank)
                assert torch.equal(tensor[:rows], b[name][:rows]), name
            stated, meant = vars(written["args"]), vars(expected["args"])
            same = {name for name in meant if name in stated} - {"vocab_size"}
            assert {name: stated[name] for name in same} == {name: meant[name] for name in same}
            assert (written["checkpoint_version"], written["iteration"]) == (3.0, 0)
    assert (tmp_path / "gpt/written/latest_checkpointed_iteration.txt").read_text() == "release"


def _flat(value: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    return {name: tensor for key, item in value.items() for name, tensor in _flat(item, f"{prefix}/{key}").items()}


def _real_rows(name: str, tensor: torch.Tensor, rank: int) -> int:
    """Rows that are not padding, which the two fill differently."""
    if "word_embeddings" in name or name.endswith("lm_head/bias"):
        return max(0, min(len(tensor), VOCAB - rank * len(tensor)))
    return len(tensor)


def test_padding_takes_no_probability(tmp_path: Path) -> None:
    """Catches padded words that a BERT finds likely, or rows that are not a multiple of 128 times the degree."""
    convert(_stock(tmp_path / "hub", "bert"), tmp_path / "m", to="megatron-lm", tp_size=2)
    ranks = [_load(tmp_path / "m", rank)["model"] for rank in range(2)]
    bias = torch.cat([rank["lm_head"]["bias"] for rank in ranks])
    words = torch.cat([rank["language_model"]["embedding"]["word_embeddings"]["weight"] for rank in ranks])
    assert words.shape == (256, 32)
    assert torch.equal(bias[VOCAB:], torch.full((256 - VOCAB,), -10000.0))
    assert not words[VOCAB:].any()


@pytest.mark.parametrize("is_large", [False, True])
def test_files_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool) -> None:
    """Catches wrong checksums, lengths or alignments, which torch itself reads over, and 32 bits in over 4 GB."""
    if is_large:  # with a lower limit every field is the large one
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    source = _stock(tmp_path / "hub", "gpt2")
    convert(source, tmp_path / "m", to="megatron-lm", tp_size=2)
    with zipfile.ZipFile(tmp_path / "m/release/mp_rank_01/model_optim_rng.pt") as archive:
        assert archive.testzip() is None
        assert any(info.extra[:2] == b"\x01\x00" for info in archive.infolist()) == is_large
    assert verify(source, tmp_path / "m").equal
    loaded = torch.load(tmp_path / "m/release/mp_rank_01/model_optim_rng.pt", weights_only=False, mmap=True)
    read = _flat(_load(tmp_path / "m", 1)["model"])
    for name, tensor in _flat(loaded["model"]).items():
        assert torch.equal(tensor, read[name]), name
        assert tensor.untyped_storage().data_ptr() % 64 == 0


@pytest.mark.parametrize(
    ("kind", "change", "options", "told"),
    [
        ("classifier", {}, {}, r"a GPT2ForSequenceClassification \(only language models\)"),
        ("gpt2", {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True}, {}, "relu.*inverse_layer"),
        ("gpt2", {"scale_attn_weights": False}, {}, "scale_attn_weights"),
        ("bert", {"type_vocab_size": 3}, {}, "type_vocab_size=3"),
        ("bert", {"hidden_act": "silu"}, {}, "silu"),
        ("gpt2", {"n_inner": 44}, {"tp_size": 8}, "intermediate_size=44 .* tp_size=8, .* choose one of 1, 2, 4\\."),
        ("gpt2", {"n_head": 2, "n_inner": 48}, {"tp_size": 4}, "num_attention_heads=2 is less than tp_size=4"),
        ("gpt2", {"n_head": 16}, {"tp_size": 3}, "num_attention_heads=16 .* choose one of 1, 2, 4, 8, 16\\."),
        ("gpt2", {}, {"vocab_size": 90}, "vocab_size=90 was given"),
    ],
)
def test_what_megatron_lm_has_not(
    tmp_path: Path, kind: str, change: dict[str, Any], options: dict[str, int], told: str
) -> None:
    """Catches a checkpoint that Megatron-LM would load and compute something else with."""
    source = _stock(tmp_path / "hub", kind, **change)
    with pytest.raises((PartitionError, UnsupportedError), match=f"(?s){told}"):
        convert(source, tmp_path / "m", to="megatron-lm", **{"tp_size": 2, **options})  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()


def test_two_rates_of_dropout_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a rate that is dropped without a word: Megatron-LM has one for embeddings and residual stream."""
    source = _stock(tmp_path / "hub", "gpt2", embd_pdrop=0.3, resid_pdrop=0.2)
    convert(source, tmp_path / "m", to="megatron-lm", tp_size=2)
    assert "one rate for embd_pdrop=0.3 and resid_pdrop=0.2" in caplog.text


_PEAK = """
import sys
from hf_megatron_conversion import convert, verify

source, destination, to, tp_size = sys.argv[1:]
conversion = convert(source, destination, to=to, tp_size=int(tp_size) or None)
if to == "tp":  # the others are compared by running the models, for which they have to be loaded
    assert verify(source, destination).equal
    conversion = convert(source, destination, to=to, tp_size=int(tp_size), overwrite=True, dry_run=True)
print(conversion.peak_rss_bytes)
"""


@pytest.mark.slow
def test_memory_does_not_depend_on_the_size(tmp_path: Path) -> None:
    """Catches a tensor, a file, a rank or a model held in memory, measured on the process as a whole."""
    peaks: dict[str, list[int]] = {}
    for layers, vocab_size in ((2, 30_000), (8, 120_000)):  # 87 and 347 MB, of which 61 and 246 are one tensor
        config = transformers.GPT2Config(n_layer=layers, n_embd=512, n_head=8, vocab_size=vocab_size, n_positions=64)
        here = tmp_path / str(layers)
        transformers.GPT2LMHeadModel(config).save_pretrained(here / "hub")
        for name, source, to, tp_size in (
            ("to tp", "hub", "tp", 4),
            ("to megatron-lm", "hub", "megatron-lm", 4),
            ("from megatron-lm", "to megatron-lm", "hub", 0),
            ("between degrees", "to megatron-lm", "megatron-lm", 2),
            ("to megatron-core", "hub", "megatron-core", 0),
            ("from megatron-core", "to megatron-core", "hub", 0),
        ):
            command = [sys.executable, "-c", _PEAK, str(here / source), str(here / name), to, str(tp_size)]
            peaks.setdefault(name, []).append(int(subprocess.check_output(command, env=environment())))
    assert {name: large - small for name, (small, large) in peaks.items() if large - small > 40e6} == {}
