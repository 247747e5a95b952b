"""Map the variants of tensor names in stock checkpoints to the names of a model class.

Hub checkpoints differ in whether they use the base model's prefix, contain obsolete buffers, call a norm's parameters
``gamma`` and ``beta``, or store a second copy of a tied head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_megatron.architectures import Architecture, ModelClass
from hf_megatron.checkpoint.lazy import LazyTensor
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, shown

Shape = tuple[int, ...]

_MAX_LISTED = 20
_COMPARED_BYTES = 16 * 2**20
_OLD_SUFFIXES = {".gamma": ".weight", ".beta": ".bias"}


@dataclass(frozen=True, slots=True)
class CanonicalTensors:
    """Stored tensors under the names of a model class's state dict, and what did not fit."""

    tensors: dict[str, LazyTensor]  # that the class has, by its names, shapes not necessarily right
    dropped: tuple[str, ...]  # obsolete buffers and an equal copy of the tied head, as stored
    unknown: tuple[str, ...]  # what the class does not have, as stored; another class's head is among it
    missing: tuple[str, ...]  # names of the class that are not stored
    mismatched: tuple[tuple[str, Shape, Shape], ...]  # name, stored shape, expected shape


def model_class_of(table: Architecture, config: Mapping[str, Any]) -> ModelClass:
    """The class that a config.json names, or the table's first one; UnsupportedError if the table lacks that class."""
    return table.class_of(config)


def respelled(name: str, known: Mapping[str, object], base_prefix: str) -> str | None:
    """The name in ``known`` that ``name`` is a spelling of, or None."""
    spellings = [name, *(name.removesuffix(old) + new for old, new in _OLD_SUFFIXES.items() if name.endswith(old))]
    prefix = f"{base_prefix}."
    candidates = (c for spelling in spellings for c in (spelling, prefix + spelling, spelling.removeprefix(prefix)))
    return next((candidate for candidate in candidates if candidate in known), None)


def canonicalise(
    tensors: Mapping[str, LazyTensor], table: Architecture, config: Mapping[str, Any], model_class: ModelClass
) -> CanonicalTensors:
    """Rename stored tensors to the names of ``model_class`` under ``config``.

    Reads no data, unless a copy of a tied tensor has to be compared with the original. CheckpointFormatError if a
    tensor is stored under two spellings, or differs from the copy it is tied to.
    """
    expected = table.tensors(config, model_class)
    found: dict[str, LazyTensor] = {}
    copies: dict[str, LazyTensor] = {}
    dropped: list[str] = []
    unknown: list[str] = []
    for stored, tensor in tensors.items():
        name = respelled(stored, expected, table.base_prefix)
        if name is not None and name in found:
            raise CheckpointFormatError(f"{name} is stored twice, as {found[name].name} and as {stored}; remove one.")
        if name is not None:
            found[name] = tensor
        elif table.is_obsolete(stored):
            dropped.append(stored)
        elif stored in model_class.tied:
            copies[stored] = tensor
        else:
            unknown.append(stored)
    for stored, copy in copies.items():
        original = respelled(model_class.tied[stored], expected, table.base_prefix)
        assert original is not None, f"{model_class.stock} has no {model_class.tied[stored]}"
        if original in found:
            _require_same(copy, found[original])
            dropped.append(stored)
        else:
            # One tensor under two names is stored once, and nothing says under which of the two.
            found[original] = copy
    return CanonicalTensors(
        tensors={name: found[name] for name in expected if name in found},
        dropped=tuple(dropped),
        unknown=tuple(unknown),
        missing=tuple(name for name in expected if name not in found),
        mismatched=tuple(
            (name, found[name].shape, tensor.shape)
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ),
    )


def stored_model(
    tensors: Mapping[str, LazyTensor], table: Architecture, config: Mapping[str, Any]
) -> tuple[ModelClass, CanonicalTensors]:
    """Find the model class of the stored tensors, and rename the tensors to its names.

    This is the class that config.json names, unless there are additional tensors and exactly one other class has them
    all: bert-base-uncased names BertForMaskedLM but contains the tensors of BertForPreTraining.
    """
    named = model_class_of(table, config)
    canonical = canonicalise(tensors, table, config, named)
    if canonical.missing or not canonical.unknown:
        return named, canonical
    others = [(other, canonicalise(tensors, table, config, other)) for other in table.classes if other is not named]
    exact = [(other, found) for other, found in others if not (found.missing or found.unknown or found.mismatched)]
    return exact[0] if len(exact) == 1 else (named, canonical)


def require_complete(canonical: CanonicalTensors) -> None:
    """Raise an error that lists every problem unless the checkpoint is exactly one complete model.

    CheckpointIncompleteError if anything is missing, else CheckpointFormatError.
    """
    shapes = [f"{name} is {list(stored)}, expected {list(expected)}" for name, stored, expected in canonical.mismatched]
    found = {"missing": canonical.missing, "unknown": canonical.unknown, "wrong shape": shapes}
    problems = [f"\n  {what}: {listed(items)}" for what, items in found.items() if items]
    if problems:
        error = CheckpointIncompleteError if canonical.missing else CheckpointFormatError
        raise error(
            "The stored tensors are not those of the model in config.json (check its architectures and sizes)."
            + "".join(problems)
        )


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """The items in one line, cut short after a readable number of them."""
    line = separator.join(item if item.isprintable() else shown(item) for item in items[:_MAX_LISTED])
    return line if len(items) <= _MAX_LISTED else f"{line}{separator}and {len(items) - _MAX_LISTED} more"


def _require_same(copy: LazyTensor, original: LazyTensor) -> None:
    if copy.dtype != original.dtype or not copy.shape == original.shape != () or not _same_bytes(copy, original):
        raise CheckpointFormatError(
            f"{copy.name} and {original.name} are stored with different values, but config.json ties them. Set "
            f'"tie_word_embeddings": false there if the head is meant to be its own, or remove {copy.name} from the '
            "checkpoint."
        )


def _same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors of one dtype and shape are bit-equal, read in blocks of rows of bounded size."""
    import torch

    rows = max(_COMPARED_BYTES * a.shape[0] // max(a.nbytes, 1), 1)
    parts = [slice(start, start + rows) for start in range(0, a.shape[0], rows)]
    return all(torch.equal(a[part].view(torch.uint8), b[part].view(torch.uint8)) for part in parts)
