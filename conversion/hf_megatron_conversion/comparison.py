"""Are two checkpoints the same model? Tensor by tensor, across formats and degrees, in bounded memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_megatron.architectures.table import TANH_GELUS
from hf_megatron.checkpoint import DTYPES, itemsize, torch_dtype
from hf_megatron.errors import UnsupportedError
from hf_megatron.partition import Box
from hf_megatron_conversion.files import Progress, Silent
from hf_megatron_conversion.formats import format_of, read_model
from hf_megatron_conversion.formats.base import Model, SourceOptions, warn_of_padding
from hf_megatron_conversion.source import source_directory
from hf_megatron_conversion.source_files import damaged
from hf_megatron_conversion.tensors import Readable, bounded, num_bytes, raw_bytes

if TYPE_CHECKING:
    import torch

_CHUNK = 2**18  # values compared at a time
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How two checkpoints compare.

    Attributes:
        equal: Whether they are the same model: the same tensors bit for bit, and no entry of config.json that would
            make it compute something else.
        compared: Number of tensors that both have.
        differences: What differs, by tensor name (or ``config.json: entry``), in words.
        damaged: Weight files that are not those that the SHA256SUMS beside them names.
        max_abs_diff: Largest difference of two values, over the tensors that both have in the same shape.
        max_logit_diff: Largest difference of the two models' outputs, if they were run. Both differences are None if
            they are not finite.
        loss_a: The first model's loss on the same token ids, of a language model that was run.
        loss_b: The second one's.
        argmax_agreement: Share of the positions at which both find the same word the most likely.
    """

    equal: bool
    compared: int
    differences: Mapping[str, str]
    damaged: tuple[str, ...]
    max_abs_diff: float | None
    max_logit_diff: float | None
    loss_a: float | None = None
    loss_b: float | None = None
    argmax_agreement: float | None = None

    @property
    def mismatched(self) -> tuple[str, ...]:
        """Names of what differs."""
        return tuple(self.differences)


def verify(
    a: str | Path,
    b: str | Path,
    *,
    logits: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare two checkpoints of any formats and degrees.

    Args:
        a: A directory, or the id of a repository on the Hub.
        b: The other one.
        logits: Also run both on the CPU in float64 on the same token ids, a Megatron-LM checkpoint by Megatron-LM's own
            equations. This holds one whole model in memory at a time.
        revision: Branch, tag or commit of those that are on the Hub.
        progress: Told how far it is.

    Raises:
        CheckpointError: One of them is no checkpoint, or incomplete.
        UnsupportedError: A model that is not offered here.
    """
    if revision is not None and Path(a).is_dir() and Path(b).is_dir():
        raise UnsupportedError(f"revision={revision!r} was given, but both {a} and {b} are directories.")
    directories = (source_directory(path, revision=None if Path(path).is_dir() else revision) for path in (a, b))
    model_a, model_b = _read_both(*directories)
    for model in (model_a, model_b):
        warn_of_padding(model)
    differences = _config_differences(model_a, model_b)
    found, largest = compare(model_a.tensors, model_b.tensors, progress or Silent())
    differences.update(found)
    damages = {
        str(path): reason
        for model in (model_a, model_b)
        for path, reason in damaged(model.directory, model.files, model.archives).items()
    }
    for path, reason in damages.items():
        _logger.error("%s %s", path, reason)
    ran = None
    if logits:
        from hf_megatron_conversion.logits import agreement

        ran = agreement(model_a, model_b)
        if ran.difference is not None:
            differences["logits"] = ran.difference
    return Verification(
        equal=not differences,
        compared=len(model_a.tensors.keys() & model_b.tensors.keys()),
        differences=differences,
        damaged=tuple(damages),
        max_abs_diff=finite(largest),
        max_logit_diff=finite(ran.max_logit_diff) if ran else None,
        loss_a=finite(ran.losses[0]) if ran else None,
        loss_b=finite(ran.losses[1]) if ran else None,
        argmax_agreement=ran.argmax_agreement if ran else None,
    )


def _read_both(a: Path, b: Path) -> tuple[Model, Model]:
    """Open two checkpoints; one without a config.json may learn from the other what its own files do not say."""
    if not format_of(a).has_config and format_of(b).has_config:
        model_b = read_model(b)
        return read_model(a, _hint(model_b)), model_b
    model_a = read_model(a)
    model_b = read_model(b, _hint(model_a))
    return (model_a if model_a.has_known_vocab_size else read_model(a, _hint(model_b))), model_b


def _hint(model: Model) -> SourceOptions:
    return SourceOptions(hint=model.config if model.has_known_vocab_size else None)


def compare(a: Mapping[str, Readable], b: Mapping[str, Readable], progress: Progress) -> tuple[dict[str, str], float]:
    """What differs, by name, in words; and the largest difference of values, infinite if just one of two is finite."""
    progress.begin("Comparing", sum(map(num_bytes, a.values())))
    differences, largest = {}, 0.0
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b:
            differences[name] = f"only in the {'first' if name in a else 'second'} checkpoint"
        elif a[name].shape != b[name].shape:
            differences[name] = f"shape {list(a[name].shape)} is not {list(b[name].shape)}"
        else:
            count, difference, strange = _compare_values(a[name], b[name], progress)
            if strange:
                _logger.warning("%s holds %d values that are NaN or infinite.", name, strange)
            largest = max(largest, difference)
            if a[name].dtype != b[name].dtype:
                dtypes = " is not ".join(DTYPES[tensor.dtype][1] for tensor in (a[name], b[name]))
                differences[name] = f"dtype {dtypes} (values differ by at most {difference:g})"
            elif count:
                differences[name] = f"{count} of {math.prod(a[name].shape)} values differ, by at most {difference:g}"
    return differences, largest


def _compare_values(a: Readable, b: Readable, progress: Progress) -> tuple[int, float, int]:
    """Number of values that are not the same bits, the largest difference, and number of the first's not finite."""
    import torch

    count, largest, strange = 0, 0.0, 0
    boxes = list(bounded(Box.whole(a.shape), a.dtype))
    # New memory for each part, or as large for each intermediate result, would leave the allocator with several times
    # as much.
    most = max(box.numel for box in boxes)
    memory = [torch.empty(most, dtype=torch_dtype(tensor.dtype)) for tensor in (a, b)]
    for box in boxes:
        for tensor, part in zip((a, b), memory, strict=True):
            tensor.read_into(raw_bytes(part[: box.numel]).numpy().data, box)
        progress.advance(box.numel * itemsize(a.dtype))
        for parts in zip(*(part[: box.numel].split(_CHUNK) for part in memory), strict=True):
            if parts[0].is_floating_point():
                strange += int((~torch.isfinite(parts[0].float())).sum())
            if a.dtype != b.dtype or not torch.equal(*map(raw_bytes, parts)):
                differing, difference = _difference(*parts)
                count, largest = count + differing, max(largest, difference)
    return count, largest, strange


def _difference(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    import torch

    wide_a, wide_b = a.double(), b.double()
    # Infinities of one sign and two NaNs are no difference in value, but subtracting them would give NaN.
    alike = (wide_a == wide_b) | (torch.isnan(wide_a) & torch.isnan(wide_b))
    difference = (wide_a - wide_b).abs().masked_fill(alike, 0.0).nan_to_num(nan=math.inf)
    if a.dtype == b.dtype:
        differing = (raw_bytes(a) != raw_bytes(b)).reshape(-1, a.element_size()).any(dim=1)
        return int(differing.sum()), difference.max().item()
    return int((~alike).sum()), difference.max().item()


def _config_differences(a: Model, b: Model) -> dict[str, str]:
    """Entries of config.json that make two models of the same tensors different functions."""
    heads = "num_attention_heads"
    entries: dict[str, tuple[object, object]] = {
        "architectures": (a.model_class.stock, b.model_class.stock),
        heads: (a.table.sizes(a.config)[heads], b.table.sizes(b.config)[heads]),
    }
    # An entry that only one of them spells out is its default, which the other leaves unsaid.
    functional = (a.table.activation.name, a.table.epsilon.name, *a.table.functional)
    entries |= {name: (a.config[name], b.config[name]) for name in functional if name in a.config and name in b.config}
    if (head := a.table.head_activation) is not None:
        entries[head] = (a.config.get(head), b.config.get(head))
    return {
        f"config.json: {name}": f"{values[0]!r} is not {values[1]!r}"
        for name, values in sorted(entries.items())
        if values[0] != values[1] and not all(value in TANH_GELUS for value in values)
    }


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
