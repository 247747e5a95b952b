"""Checkpoints that Megatron-LM's own code saved, with the logits that it computed.

They are not part of the repository, so this module is collected only where HF_MEGATRON_REAL_CHECKPOINTS is set (see
conftest.py). It names a directory with one directory for each: ``src`` with the checkpoint; ``ids.pt``, ``mask.pt``,
for BERT ``tokentype_ids.pt``; ``expected_logits.pt``, for BERT with a second head ``expected_binary_logits.pt``;
``meta.json`` with ``kind`` (``gpt`` or ``bert``), ``vocab_size`` and ``num_attention_heads``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_megatron
from hf_megatron_conversion import convert
from hf_megatron_conversion.formats import read_model
from hf_megatron_conversion.formats.base import SourceOptions
from hf_megatron_conversion.formats.megatron_lm import MegatronCheckpoint
from tests.conversion.checkpoints import read_config

_CASES = sorted(path.parent for path in Path(os.environ["HF_MEGATRON_REAL_CHECKPOINTS"]).glob("*/meta.json"))
assert _CASES, "HF_MEGATRON_REAL_CHECKPOINTS names a directory without checkpoints"
# The largest difference that a right conversion showed is 1.2e-5, the smallest of a wrong one 2.7e-4; both in float32.
_TOLERANCE = 5e-5


def _optional(path: Path) -> torch.Tensor | None:
    return torch.load(path, weights_only=True) if path.exists() else None


def _config(case: Path, meta: dict[str, Any], directory: Path) -> Path | None:
    """A config.json with the number of heads, for files from before v1.0, which do not say it."""
    described = read_model(case / "src", SourceOptions(is_only_described=True))
    assert isinstance(described.opened, MegatronCheckpoint)
    if described.opened.arguments is not None:
        return None
    name = "num_attention_heads" if meta["kind"] == "bert" else "n_head"
    file = directory / "config.json"
    file.write_text(json.dumps({"model_type": described.table.stock_model_type, name: meta["num_attention_heads"]}))
    return file


@pytest.mark.parametrize("case", _CASES, ids=lambda path: path.name)
def test_logits_are_megatron_lm_s(case: Path, tmp_path: Path) -> None:
    """Catches anything in which this package's idea of Megatron-LM is not what Megatron-LM does."""
    meta = json.loads((case / "meta.json").read_text())
    options = {"vocab_size": meta["vocab_size"], "config": _config(case, meta, tmp_path)}
    assert convert(case / "src", tmp_path / "hub", to="hub", verify=True, **options).verified
    config = read_config(tmp_path / "hub")
    name = config["architectures"][0]
    library: Any = transformers
    if "prediction_head_act" in config:
        library, name = hf_megatron, "Megatron" + name.removeprefix("Megatron")
    model = getattr(library, name).from_pretrained(tmp_path / "hub", dtype=torch.float32).eval()
    ids, mask, types, logits, binary = (
        _optional(case / f"{stem}.pt")
        for stem in ("ids", "mask", "tokentype_ids", "expected_logits", "expected_binary_logits")
    )
    assert ids is not None
    is_bert = meta["kind"] == "bert"
    arguments = {"attention_mask": mask, "token_type_ids": types} if is_bert else {}
    with torch.no_grad():
        outputs = model(ids, **arguments).to_tuple()
    is_valid = mask.bool() if is_bert and mask is not None else torch.ones_like(ids).bool()
    assert (outputs[0] - logits)[is_valid].abs().max() < _TOLERANCE
    if binary is not None:
        assert (outputs[1] - binary).abs().max() < _TOLERANCE
