"""`verify` tells models apart, and proves a conversion by running it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_megatron_conversion import convert, files, verify
from hf_megatron_conversion.tensors import slices_of_bytes
from tests.conversion.checkpoints import read_config, read_tensors, save_stock, there_and_back, write_hub

Changes = dict[tuple[int, int], float]

WEIGHT = "transformer.h.1.attn.c_attn.weight"


def _changed(source: Path, directory: Path, changes: Changes, **entries: Any) -> Path:
    """A copy of a hub directory with other values at some places of WEIGHT, and other entries in its config.json."""
    tensors = read_tensors(source)
    for place, value in changes.items():
        tensors[WEIGHT][place] = value
    return write_hub(directory, tensors, {**read_config(source), **entries})


def test_equal_across_formats_and_degrees(stock: Path, tmp_path: Path) -> None:
    """Catches a comparison of pieces rather than of tensors."""
    two, three, _ = there_and_back(stock, tmp_path, 2, 3)
    for a in (stock, two):
        result = verify(a, three)
        assert (result.equal, result.mismatched, result.max_abs_diff, result.max_logit_diff) == (True, (), 0.0, None)
        assert result.compared == len(read_tensors(stock))


@pytest.mark.parametrize(
    ("before", "after", "max_abs_diff"),
    [
        ({(-1, -1): 7.0}, {(-1, -1): 8.0}, 1.0),
        ({(0, 0): 0.0, (0, 1): math.nan}, {(0, 0): -0.0, (0, 1): math.nan}, 0.0),
        ({(3, 5): 0.0}, {(3, 5): math.nan}, None),
    ],
)
def test_bits_count_not_values(
    before: Changes, after: Changes, max_abs_diff: float | None, tied: Path, tmp_path: Path
) -> None:
    """Catches a tolerance, a tensor's end left out, -0.0 taken for 0.0, NaN for different from itself, or lost in a
    maximum, or in the JSON, which is none then."""
    a, b = (_changed(tied, tmp_path / name, changes) for name, changes in (("a", before), ("b", after)))
    assert verify(a, a).equal
    result = verify(a, b)
    assert (result.equal, result.mismatched, result.max_abs_diff) == (False, (WEIGHT,), max_abs_diff)
    assert result.differences[WEIGHT].startswith("1 of 6912 values")


def test_missing_tensors_shapes_and_dtypes(tied: Path, untied: Path, tmp_path: Path) -> None:
    """Catches a comparison of common names only, or of values without their dtype."""
    assert verify(tied, untied).differences["lm_head.weight"] == "only in the second checkpoint"
    wider = save_stock(tmp_path / "wider", vocab_size=132)
    assert verify(tied, wider).differences["transformer.wte.weight"] == "shape [131, 48] is not [132, 48]"
    exact = tmp_path / "float64"
    convert(tied, exact, to="hub", dtype="float64")
    result = verify(tied, exact)
    assert set(result.mismatched) == set(read_tensors(tied))
    assert result.max_abs_diff == 0.0


_ENTRIES: list[tuple[dict[str, Any], list[str]]] = [
    ({"n_head": 6}, ["num_attention_heads"]),
    ({"layer_norm_epsilon": 0.5}, ["layer_norm_epsilon"]),
    ({"transformers_version": "4.0", "n_layer": 2, "resid_pdrop": 0.3}, []),
]


@pytest.mark.parametrize(("entries", "named"), _ENTRIES)
def test_entries_count_where_they_change_the_function(
    entries: dict[str, Any], named: list[str], tied: Path, tmp_path: Path
) -> None:
    """Catches two models taken for one because the number of heads shows in no tensor's shape, and mere bookkeeping."""
    result = verify(tied, _changed(tied, tmp_path / "changed", {}, **entries))
    assert result.mismatched == tuple(f"config.json: {name}" for name in named)


def test_logits_find_what_tensors_and_known_entries_do_not_show(tied: Path, tmp_path: Path) -> None:
    """Catches --logits that only repeats the comparison of tensors."""
    # An entry that one side leaves at its default is not compared; running the models shows it.
    scaled = _changed(tied, tmp_path / "scaled", {}, scale_attn_weights=False)
    config = {key: value for key, value in read_config(scaled).items() if key != "scale_attn_weights"}
    default = write_hub(tmp_path / "default", read_tensors(tied), config)
    assert verify(default, scaled).equal
    result = verify(default, scaled, logits=True)
    assert result.mismatched == ("logits",)
    assert result.max_logit_diff is not None
    assert result.max_logit_diff > 0.01


def test_convert_verify_catches_a_bad_write(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a --verify that compares the plan with itself, and a wrong result left at the destination."""

    def flipped(*arguments: Any) -> Iterator[bytes]:
        for data in slices_of_bytes(*arguments):
            yield bytes([data[0] ^ 1, *data[1:]])

    monkeypatch.setattr(files, "slices_of_bytes", flipped)
    conversion = convert(tied, tmp_path / "tp", to="tp", tp_size=2, verify=True)
    assert conversion.verified is False
    assert list(tmp_path.iterdir()) == []
    assert WEIGHT in caplog.text
