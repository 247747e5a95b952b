"""Distributed checkpoints of Megatron-core as stock models: the logits are Megatron's."""

from __future__ import annotations

import itertools
import logging
import re
from dataclasses import replace
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from hf_megatron.errors import CheckpointError, CheckpointIncompleteError, PartitionError
from hf_megatron_conversion import convert, inspect, verify
from tests.conversion.megatron_core.generator import Distributed, content_of, write, write_content
from tests.conversion.megatron_lm.generator import VOCAB, Variant, make_weights
from tests.conversion.megatron_lm.generator import write as write_ranks
from tests.conversion.megatron_lm.test_read import assert_converts

GPT, BERT = Distributed(), Distributed(kind="bert")

# What each group of variants catches.
_VARIANTS = {
    "chunks of several ranks put together in the wrong order, or along the wrong dimension": [
        replace(kind, tp=tp) for kind in (GPT, BERT) for tp in (1, 2, 4)
    ],
    "layer 10 taken for the second, or one layer for none": [replace(GPT, layers=layers) for layers in (1, 11)],
    "a key for each layer, or a wrapper's prefix, not known": [
        replace(kind, is_stacked=False, prefix=prefix) for kind in (GPT, BERT) for prefix in ("", "module.", "model.")
    ],
    "a head of its own dropped, or a BERT without its second head given one": [
        replace(GPT, is_untied=True),
        replace(BERT, has_binary_head=False),
    ],
    "the exact gelu taken for the tanh form": [replace(kind, gelu="erf") for kind in (GPT, BERT)],
    "arguments looked for in common.pt only": [replace(GPT, common="object")],
    "the optimizer's moments taken for weights": [replace(GPT, has_optimizer=True)],
}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(variant, id=f"{what}-{i}") for what in _VARIANTS for i, variant in enumerate(_VARIANTS[what])],
)
def test_the_logits_are_megatron_s(tmp_path: Path, variant: Distributed) -> None:
    """Catches, by variant, what ``_VARIANTS`` says."""
    weights = make_weights(variant)
    assert_converts(tmp_path, variant, weights=weights, source=write(tmp_path / "source", variant, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Catches bytes of one type read as another's; every tensor equals that of the same model in one file per rank."""
    variant = replace(BERT, dtype=dtype)
    write(tmp_path / "source", variant)
    write_ranks(tmp_path / "ranks", Variant(kind="bert", names="te", gelu="fused", dtype=dtype))
    assert verify(tmp_path / "source", tmp_path / "ranks").equal


def test_a_tensor_in_one_chunk_or_in_many(tmp_path: Path) -> None:
    """Catches a reader that takes a chunk for a layer of a rank: others may cut tensors as they like."""
    content = content_of(replace(GPT, tp=1), make_weights(GPT))
    for name, shape in content.shapes.items():
        whole = torch.empty(shape)
        for offset, part in content.chunks[name]:
            whole[tuple(slice(a, a + b) for a, b in zip(offset, part.shape, strict=True))] = part
        sizes = [(size // 2, size - size // 2) if len(name) % 2 and size > 1 else (size,) for size in shape]
        places = [list(itertools.accumulate((0, *parts[:-1]))) for parts in sizes]
        content.chunks[name] = [
            (tuple(o), whole[tuple(slice(a, a + b) for a, b in zip(o, s, strict=True))])
            for o, s in zip(itertools.product(*places), itertools.product(*sizes), strict=True)
        ]
    write_content(tmp_path / "source", content)
    assert_converts(tmp_path, GPT, weights=make_weights(GPT), source=tmp_path / "source")


def test_to_shards_and_verified(tmp_path: Path) -> None:
    """Catches a degree that is not the source's, and Megatron's equations run with chunks as if they were ranks."""
    write(tmp_path / "source", GPT)
    result = convert(tmp_path / "source", tmp_path / "tp", to="tp", tp_size=4, vocab_size=VOCAB, verify=True)
    assert (result.verified, result.tp_size) == (True, 4)
    assert verify(tmp_path / "source", tmp_path / "tp", logits=True).equal
    with pytest.raises(PartitionError, match="--tp N"):
        convert(tmp_path / "source", tmp_path / "other", to="tp", vocab_size=VOCAB)


def test_inspect(tmp_path: Path) -> None:
    """Catches the container, or the degree, not being told."""
    write(tmp_path / "gpt", GPT)
    write_ranks(tmp_path / "ranks", Variant(names="core"))
    write_ranks(tmp_path / "legacy", Variant())
    found = inspect(tmp_path / "gpt")
    assert (found.format, found.container, found.architecture, found.tp_size) == (
        "megatron-core",
        "torch_dist",
        "gpt2",
        2,
    )
    assert (found.checkpoint_version, found.dtype) == (3.0, "float32")
    found = inspect(tmp_path / "ranks")
    assert (found.format, found.container) == ("megatron-core", "torch")
    found = inspect(tmp_path / "legacy")
    assert (found.format, found.container) == ("megatron-lm", None)


def test_one_iteration(tmp_path: Path) -> None:
    """Catches a reader that wants the root of a run, or that takes any iteration where the root names one."""
    write(tmp_path, GPT)
    assert inspect(tmp_path / "iter_0001000").format == "megatron-core"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2000")
    with pytest.raises(CheckpointIncompleteError, match="iter_0002000 is missing"):
        inspect(tmp_path)


def test_the_optimizer_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an optimizer's state that is dropped without a word."""
    write(tmp_path / "source", replace(GPT, has_optimizer=True))
    with caplog.at_level(logging.WARNING):
        inspect(tmp_path / "source")
    assert "optimizer's state (32 tensors)" in caplog.text


def _bridge(directory: Path, fields: str) -> Path:
    """A checkpoint as Megatron-Bridge writes it: no arguments, the sizes in a YAML file, a tracker of its own."""
    write(directory, replace(GPT, common=None))
    (directory / "latest_checkpointed_iteration.txt").unlink()
    torch.save({"step": torch.tensor(1000), "do_train": torch.tensor(True)}, directory / "latest_train_state.pt")
    (directory / "iter_0001000/run_config.yaml").write_text(fields)
    return directory


_FLAT = """
model:
  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
  activation_func: &id001 {_call_: false, _target_: torch._C._nn.gelu}
  add_bias_linear: true
  bias_activation_fusion: true
  gated_linear_unit: false
  hidden_size: 32
  layernorm_epsilon: 1.0e-05
  normalization: LayerNorm
  num_attention_heads: 8
  num_layers: 2
  num_query_groups: null
  other: *id001
  position_embedding_type: learned_absolute
  seq_length: 24
  share_embeddings_and_output_weights: true
  vocab_size: 101
"""
_NESTED = """
model:
  _target_: megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig
  position_embedding_type: learned_absolute
  seq_length: 24
  share_embeddings_and_output_weights: true
  transformer: {num_layers: 2, hidden_size: 32, num_attention_heads: 8, ffn_hidden_size: null, layernorm_epsilon: 1e-05,
    bias_activation_fusion: true, activation_func: gelu}
  vocab_size: 101
"""


@pytest.mark.parametrize("fields", [_FLAT, _NESTED], ids=["flat", "nested"])
def test_megatron_bridge(tmp_path: Path, fields: str) -> None:
    """Catches a root of Megatron-Bridge, or one of its two forms of settings, that is not understood."""
    source = _bridge(tmp_path / "source", fields)
    assert_converts(tmp_path, GPT, weights=make_weights(GPT), source=source)


def test_megatron_bridge_s_default_is_the_exact_gelu(tmp_path: Path) -> None:
    """Catches Megatron-LM's default of the fused kernel taken for Megatron-Bridge's."""
    exact = replace(GPT, gelu="erf")
    source = _bridge(
        tmp_path / "source", _FLAT.replace("bias_activation_fusion: true", "bias_activation_fusion: false")
    )
    assert_converts(tmp_path, exact, weights=make_weights(exact), source=source)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("gated_linear_unit: false", "gated_linear_unit: true", "gated_linear_unit"),
        ("torch._C._nn.gelu", "torch.nn.functional.silu", "activation_func='silu'"),
        ("LayerNorm\n", "RMSNorm\n", "RMSNorm"),
        ("learned_absolute", "rope", "position_embedding_type"),
        ("num_query_groups: null", "num_query_groups: 2", "num_query_groups=2"),
        ("num_layers: 2", "num_layers: 3", "num_layers is 2 in the tensors, 3 in the arguments"),
        ("seq_length: 24", "seq_length: 24\n  window_size: [4, 0]", "window_size"),
        ("model:", "nothing:", "has no 'model'"),
        ("model:", "model: [", "is not valid YAML"),
    ],
)
def test_settings_that_are_not_supported(tmp_path: Path, old: str, new: str, told: str) -> None:
    """Catches a setting of Megatron-Bridge's that is ignored, so that the model computes something else."""
    source = _bridge(tmp_path / "source", _FLAT.replace(old, new))
    with pytest.raises(CheckpointError, match=re.escape(told)):
        convert(source, tmp_path / "hub", to="hub")


def test_nemo_2(tmp_path: Path) -> None:
    """Catches NeMo's prefix, its directories, its settings, or a ``common.pt`` that is none of Megatron-LM's."""
    write_content(tmp_path / "source/weights", content_of(replace(GPT, prefix="module."), make_weights(GPT)))
    torch.save({"loops": Fraction(1, 2)}, tmp_path / "source/weights/common.pt")
    (tmp_path / "source/context").mkdir()
    (tmp_path / "source/context/model.yaml").write_text(
        _FLAT.replace("model:", "config:").replace("  vocab_size: 101", "")
    )
    assert_converts(tmp_path, GPT, weights=make_weights(GPT), source=tmp_path / "source")


def test_nemo_1(tmp_path: Path) -> None:
    """Catches NeMo 1's names for the settings."""
    write_content(tmp_path / "source/model_weights", content_of(replace(BERT, prefix="model."), make_weights(BERT)))
    (tmp_path / "source/model_config.yaml").write_text(
        "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 8\nmax_position_embeddings: 24\nencoder_seq_length: 20\n"
        "normalization: layernorm\nlayernorm_epsilon: 1e-5\nactivation: gelu\nbias_activation_fusion: true\n"
        "bias: true\n"
    )
    assert_converts(tmp_path, BERT, weights=make_weights(BERT), source=tmp_path / "source")


@pytest.mark.parametrize("kind", ["megatron", "nemo"])
def test_a_repository_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Catches a repository of such files fetched in part, or refused before its files are there."""
    snapshot, content = tmp_path / "snapshot", content_of(GPT, make_weights(GPT))
    if kind == "megatron":
        write(snapshot, GPT)
    else:
        write_content(snapshot / "weights", content)
        (snapshot / "context").mkdir()
        (snapshot / "context/model.yaml").write_text(_FLAT.replace("model:", "config:"))
    cache = tmp_path / "cache"

    def snapshot_download(_: str, allow_patterns: list[str]) -> str:
        for path in snapshot.rglob("*"):
            name = path.relative_to(snapshot)
            if path.is_file() and any(fnmatch(str(name), pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                (cache / name).write_bytes(path.read_bytes())
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_converts(tmp_path, GPT, weights=make_weights(GPT), source="some/repository")  # type: ignore[arg-type]
