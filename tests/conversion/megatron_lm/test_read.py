"""Megatron-LM checkpoints of every layout become stock models that compute what Megatron-LM computed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_megatron
from hf_megatron_conversion import convert
from tests.conversion.megatron_lm.generator import VOCAB, Variant, forward, inputs, make_weights, write

# Both sides compute in float64. Beyond rounding, the tanh gelus of the two differ by 1e-9, in the constant's last digit.
TOLERANCE = 1e-7

_KINDS = {"gpt": {"kind": "gpt"}, "bert-pre": {"kind": "bert"}, "bert-post": {"kind": "bert", "is_post": True}}
_SAVED = [
    # checkpoint_version, names, and whether torch before 1.6 wrote it: what existed together.
    (None, "first", False),
    (0, "first", True),
    (1, "first", True),
    (1.0, "first", False),
    (2.0, "first", True),
    (3.0, "first", True),
    (3.0, "second", True),
]


def assert_converts(tmp_path: Path, variant: Variant, **options: Any) -> None:
    """Write, convert to a hub directory, run that, and compare with the equations."""
    weights = make_weights(variant)
    source = write(tmp_path / "source", variant, weights)
    convert(source, tmp_path / "hub", to="hub", **{"vocab_size": VOCAB, **options})
    ids, mask, types = inputs(variant)
    expected = forward(variant, weights, ids, mask, types)
    config = json.loads((tmp_path / "hub/config.json").read_text())
    assert config["vocab_size"] == VOCAB
    class_name = config["architectures"][0]
    model_class: Any = getattr(transformers, class_name)
    if "prediction_head_act" in config:
        # The stock classes cannot express it; ours read the same directory.
        model_class = getattr(hf_megatron, "Megatron" + class_name.removeprefix("Megatron"))
    model = model_class.from_pretrained(tmp_path / "hub", dtype=torch.float64).eval()
    arguments = {"attention_mask": mask, "token_type_ids": types} if variant.is_bert else {}
    with torch.no_grad():
        outputs = model(ids, **arguments).to_tuple()
    assert outputs[0].shape == expected[0].shape
    is_valid = mask.bool()
    assert (outputs[0] - expected[0])[is_valid].abs().max() < TOLERANCE
    if len(expected) > 1:
        assert (outputs[1] - expected[1]).abs().max() < TOLERANCE


@pytest.mark.parametrize(("version", "names", "is_zip"), _SAVED)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", list(_KINDS))
def test_every_version_and_degree(
    tmp_path: Path, kind: str, tp: int, version: float | None, names: str, is_zip: bool
) -> None:
    """Catches queries, keys and values in the order of another version, or reordered after the ranks were joined."""
    assert_converts(tmp_path, Variant(**_KINDS[kind], version=version, names=names, tp=tp, is_zip=is_zip))


@pytest.mark.parametrize(("kind", "gelu", "names"), list(product(_KINDS, ["fused", "openai"], ["second", "core"])))
def test_every_gelu(tmp_path: Path, kind: str, gelu: str, names: str) -> None:
    """Catches the one activation of a stock BERT used where Megatron-LM had two, or the tanh form taken for the exact."""
    if names == "core" and (gelu == "openai" or kind == "bert-post"):
        pytest.skip("Megatron-core has no such switch")
    assert_converts(tmp_path, Variant(**_KINDS[kind], gelu=gelu, names=names))
