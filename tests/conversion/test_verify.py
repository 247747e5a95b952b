"""`verify` tells models apart, and proves a conversion by running it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_megatron_conversion import convert, verify
from tests.conversion.checkpoints import read_config, save_stock

Tensors = dict[str, torch.Tensor]

WEIGHT = "transformer.h.1.attn.c_attn.weight"


def _changed(source: Path, directory: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of a hub directory with changed tensors."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _with_config(source: Path, directory: Path, **entries: object) -> Path:
    _changed(source, directory, lambda tensors: None)
    (directory / "config.json").write_text(json.dumps({**read_config(source), **entries}))
    return directory


def test_equal_across_formats_and_degrees(stock: Path, tmp_path: Path) -> None:
    """Catches a comparison of pieces rather than of tensors."""
    for tp_size in (2, 3):
        convert(stock, tmp_path / str(tp_size), to="tp", tp_size=tp_size)
    for a, b in ((stock, tmp_path / "3"), (tmp_path / "2", tmp_path / "3")):
        result = verify(a, b)
        assert result.equal
        assert result.mismatched == ()
        assert result.max_abs_diff == 0.0
        assert result.max_logit_diff is None
        assert result.compared == len(load_file(stock / "model.safetensors"))


def test_one_changed_value_is_found(tied: Path, tmp_path: Path) -> None:
    """Catches a comparison with a tolerance, or one that stops short of a tensor's end."""

    def change(tensors: Tensors) -> None:
        tensors[WEIGHT][-1, -1] = 8.0

    value = load_file(tied / "model.safetensors")[WEIGHT][-1, -1].item()
    result = verify(tied, _changed(tied, tmp_path / "changed", change))
    assert not result.equal
    assert result.mismatched == (WEIGHT,)
    assert result.max_abs_diff == abs(8.0 - value)
    assert "1 of 6912 values" in result.differences[WEIGHT]


@pytest.mark.parametrize("neighbour", [1.0, math.nan])
def test_bits_count_not_values(neighbour: float, tied: Path, tmp_path: Path) -> None:
    """Catches -0.0 taken for 0.0, and NaN taken for different from itself."""

    def zero(tensors: Tensors) -> None:
        tensors[WEIGHT][0, 0], tensors[WEIGHT][0, 1] = 0.0, neighbour

    def negative_zero(tensors: Tensors) -> None:
        tensors[WEIGHT][0, 0], tensors[WEIGHT][0, 1] = -0.0, neighbour

    a, b = _changed(tied, tmp_path / "a", zero), _changed(tied, tmp_path / "b", negative_zero)
    assert verify(a, a).equal
    result = verify(a, b)
    assert result.mismatched == (WEIGHT,)
    assert result.max_abs_diff == 0.0
    assert result.differences[WEIGHT].startswith("1 of 6912 values")


def test_nan_for_a_number_is_no_finite_difference(tied: Path, tmp_path: Path) -> None:
    """Catches NaN lost in a maximum, and NaN in the JSON, which is none then."""

    def change(tensors: Tensors) -> None:
        tensors[WEIGHT][3, 5] = math.nan

    result = verify(tied, _changed(tied, tmp_path / "changed", change))
    assert not result.equal
    assert result.max_abs_diff is None


def test_missing_tensors_shapes_and_dtypes(tied: Path, untied: Path, tmp_path: Path) -> None:
    """Catches a comparison of common names only, or of values without their dtype."""
    assert verify(tied, untied).differences["lm_head.weight"] == "only in the second checkpoint"
    wider = save_stock(tmp_path / "wider", vocab_size=132)
    result = verify(tied, wider)
    assert result.differences["transformer.wte.weight"] == "shape [131, 48] is not [132, 48]"
    exact = tmp_path / "float64"
    convert(tied, exact, to="hub", dtype="float64")
    result = verify(tied, exact)
    assert set(result.mismatched) == set(load_file(tied / "model.safetensors"))
    assert result.max_abs_diff == 0.0


def test_same_tensors_different_function(tied: Path, tmp_path: Path) -> None:
    """Catches two models taken for one because the number of heads shows in no tensor's shape."""
    result = verify(tied, _with_config(tied, tmp_path / "heads", n_head=6))
    assert result.mismatched == ("config.json: num_attention_heads",)
    result = verify(tied, _with_config(tied, tmp_path / "norm", layer_norm_epsilon=0.5))
    assert result.mismatched == ("config.json: layer_norm_epsilon",)


def test_bookkeeping_is_no_difference(tied: Path, tmp_path: Path) -> None:
    """Catches a check that finds fault with every directory saved by another version."""
    changed = _with_config(tied, tmp_path / "changed", transformers_version="4.0", n_layer=2, resid_pdrop=0.3)
    assert verify(tied, changed).equal


def test_logits_of_equal_models(stock: Path, tmp_path: Path) -> None:
    """Catches a conversion whose names fit and whose function does not: both sides run as the stock class."""
    convert(stock, tmp_path / "tp", to="tp", tp_size=3)
    result = verify(stock, tmp_path / "tp", logits=True)
    assert result.equal
    assert result.max_logit_diff == 0.0


def test_logits_find_what_tensors_and_known_entries_do_not_show(tied: Path, tmp_path: Path) -> None:
    """Catches --logits that only repeats the comparison of tensors."""
    # An entry that one side leaves at its default is not compared; running the models shows it.
    directory = _with_config(tied, tmp_path / "scaled", scale_attn_weights=False)
    config = read_config(directory)
    default = _with_config(tied, tmp_path / "default")
    (default / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "scale_attn_weights"})
    )
    assert verify(default, directory).equal
    result = verify(default, directory, logits=True)
    assert result.mismatched == ("logits",)
    assert result.max_logit_diff is not None
    assert result.max_logit_diff > 0.01


def test_convert_verify_catches_a_bad_write(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a --verify that compares the plan with itself, and a wrong result left at the destination."""
    from hf_megatron_conversion import files
    from hf_megatron_conversion.tensors import slices_of_bytes

    def flipped(*arguments: Any) -> Iterator[bytes]:
        for data in slices_of_bytes(*arguments):
            yield bytes([data[0] ^ 1, *data[1:]])

    monkeypatch.setattr(files, "slices_of_bytes", flipped)
    conversion = convert(tied, tmp_path / "tp", to="tp", tp_size=2, verify=True)
    assert conversion.verified is False
    assert list(tmp_path.iterdir()) == []
    assert WEIGHT in caplog.text
