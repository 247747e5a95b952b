"""The README.md of a converted checkpoint: what it is, where it came from, and how far it has been checked."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from hf_megatron.checkpoint import DTYPES, itemsize
from hf_megatron_conversion.card_text import card_text
from hf_megatron_conversion.files import TextFile
from hf_megatron_conversion.formats.base import Model
from hf_megatron_conversion.tensors import Readable

_BEGIN, _END = "<!-- hf-megatron convert: begin -->", "<!-- hf-megatron convert: end -->"


def model_card(
    *,
    model: Model,
    tensors: Mapping[str, Readable],
    config: Mapping[str, Any],
    source: str,
    layout: str,
    verified: bool,
    mismatch: str | None,
) -> TextFile:
    """The source's README.md with a section on this conversion; a card of what the configuration says if it has none.

    The section of an earlier conversion is replaced; the rest (licence, authors, intended use) stays as it is.

    Args:
        model: The source.
        tensors: What the destination holds.
        config: The destination's config.json.
        source: What to call the source.
        layout: The destination's format and degree.
        verified: Whether the result is published only if it equals the source.
        mismatch: What the stock class computes differently, or None.
    """
    architecture = config["architectures"][0]
    check = (
        "every tensor was read back and equals the source bit for bit, and both models compute the same logits"
        if verified
        else "not asked for; `hf-megatron verify SOURCE THIS` compares every tensor"
    )
    if verified and any(tensor is not model.tensors[name] for name, tensor in tensors.items()):
        check = (
            "every tensor was read back and equals the source, cast to the new dtype, bit for bit, and both models "
            "compute the same logits"
        )
    rows = {
        "source": f"`{source}` ({_origin(model)})",
        "format": layout,
        "architecture": f"`{architecture}` (`{config['model_type']}`)",
        "parameters": f"{sum(prod(tensor.shape) for tensor in tensors.values()):,}",
        "tensors": f"{len(tensors):,}",
        "bytes": f"{sum(prod(tensor.shape) * itemsize(tensor.dtype) for tensor in tensors.values()):,}",
        "dtype": dtype_names(tensors),
        "verification": check,
    }
    if mismatch is not None:
        rows["differs in stock transformers"] = mismatch
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    section = f"{_BEGIN}\n## Conversion\n\n| | |\n| --- | --- |\n{table}\n\nMade with `hf-megatron convert`.\n{_END}\n"
    path = model.directory / "README.md"
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else _new_card(config, architecture)
    return TextFile("README.md", _with_section(before, section).encode())


def dtype_names(tensors: Mapping[str, Readable]) -> str:
    """The dtypes of the tensors, as torch calls them, the one with the most elements first: ``float32, bfloat16``."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + prod(tensor.shape)
    return ", ".join(DTYPES[code][1] for code in sorted(counts, key=lambda code: -counts[code]))


def _origin(model: Model) -> str:
    degree = "" if model.format == "hub" else f", tensor-parallel degree {model.tp_size}"
    version = "" if model.checkpoint_version is None else f", checkpoint_version {model.checkpoint_version:g}"
    return f"{model.format}{degree}{version}"


def _new_card(config: Mapping[str, Any], title: str) -> str:
    summary = "The checkpoint came without a card. What stands here follows from its configuration."
    return card_text(config, title=title, summary=summary)


def _with_section(card: str, section: str) -> str:
    head, begin, rest = card.partition(_BEGIN)
    if not begin:
        return f"{card.rstrip()}\n\n{section}"
    tail = rest.partition(_END)[2]
    return f"{head}{section}{tail.lstrip()}"
