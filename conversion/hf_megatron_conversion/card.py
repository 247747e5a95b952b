"""The README.md of a converted checkpoint: what model it is, where it came from, and what was verified."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from hf_megatron.architectures import table_for
from hf_megatron.checkpoint import DTYPES
from hf_megatron.checkpoint.budgets import MAX_CARD_BYTES
from hf_megatron_conversion.files import TextFile
from hf_megatron_conversion.formats.base import Model, Target
from hf_megatron_conversion.source_files import hub_commit, is_inside
from hf_megatron_conversion.tensors import Readable, num_bytes

_logger = logging.getLogger(__name__)

CARD = "README.md"
_BEGIN, _END = "<!-- hf-megatron convert: begin -->", "<!-- hf-megatron convert: end -->"
_PIPELINES = {
    "LMHeadModel": "text-generation",
    "ForPreTraining": "fill-mask",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "Model": "feature-extraction",
}


def model_card(
    target: Target, config: Mapping[str, Any], *, source: str, layout: str, verified: bool, mismatch: str | None
) -> TextFile:
    """The source's README.md, or a new one, with a section on this conversion in place of an earlier conversion's.

    ``config`` and ``layout`` are the destination's, ``source`` is what to call the source. ``verified`` says that the
    result is published only if it equals the source, ``mismatch`` what the stock class computes differently.
    """
    model, tensors = target.model, target.tensors
    commit = hub_commit(model.directory)
    cast = ", cast to the new dtype," if target.is_cast else ""
    check = "not asked for; `hf-megatron verify SOURCE THIS` compares every tensor"
    if verified:
        check = f"every tensor was read back and equals the source{cast} bit for bit, and both models compute the same "
        check += "logits"
    rows = {
        "source": f"`{source}`{f' at commit `{commit}`' if commit else ''} ({_origin(model)})",
        "format": layout,
        "architecture": f"`{config['architectures'][0]}` (`{config['model_type']}`)",
        "parameters": f"{sum(prod(tensor.shape) for tensor in tensors.values()):,}",
        "tensors": f"{len(tensors):,}",
        "bytes": f"{sum(map(num_bytes, tensors.values())):,}",
        "dtype": dtype_names(tensors),
        "verification": check,
    }
    if mismatch is not None:
        rows["differs in stock transformers"] = mismatch
    conversion = f"## Conversion\n\n{table(('', ''), rows.items())}\n\nMade with `hf-megatron convert`."
    section = f"{_BEGIN}\n{conversion}\n{_END}\n"
    path = model.directory / CARD
    card = (
        f"---\n{metadata(config)}\n---\n\n# {config['architectures'][0]}\n\nThe checkpoint came without a card. What "
        f"stands here follows from its configuration.\n\n## Architecture\n\n{architecture_table(config)}\n"
    )
    if (found := source_card(model.directory)) is not None:
        card = found.read_text(encoding="utf-8", errors="replace")
    elif path.is_file():
        is_large = is_inside(model.directory, path)
        reason = f"larger than {MAX_CARD_BYTES:,} bytes" if is_large else f"a link to {path.resolve()}"
        _logger.warning("%s is %s, and left out.", path, reason)
    head, begin, rest = card.partition(_BEGIN)
    text = head + section + rest.partition(_END)[2].lstrip() if begin else f"{card.rstrip()}\n\n{section}"
    return TextFile(CARD, text.encode())


def source_card(directory: Path) -> Path | None:
    """The card of a checkpoint; None if it has none, a link out of its directory, or a file too large for one."""
    path = directory / CARD
    is_card = path.is_file() and is_inside(directory, path) and path.stat().st_size <= MAX_CARD_BYTES
    return path if is_card else None


def dtype_names(tensors: Mapping[str, Readable]) -> str:
    """The dtypes of the tensors, as torch calls them, the one with the most elements first: ``float32, bfloat16``."""
    counts = Counter[str]()
    for tensor in tensors.values():
        counts[tensor.dtype] += prod(tensor.shape)
    return ", ".join(DTYPES[code][1] for code, _ in counts.most_common())


def metadata(config: Mapping[str, Any]) -> str:
    """The lines of the YAML header by which the Hub finds and runs a model."""
    architecture = table_for(config)
    stock = architecture.class_of(config).stock
    pipeline = next(tag for suffix, tag in _PIPELINES.items() if stock.endswith(suffix))
    tags = "\n".join(f"- {tag}" for tag in (architecture.name, "megatron-lm", "tensor-parallelism"))
    return f"library_name: transformers\npipeline_tag: {pipeline}\ntags:\n{tags}"


def architecture_table(config: Mapping[str, Any]) -> str:
    """What config.json says of the model's class and sizes."""
    architecture = table_for(config)
    model_class = architecture.class_of(config)
    sizes = architecture.sizes(config)
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    parameters = sum(prod(tensor.shape) for tensor in architecture.tensors(config, model_class).values())
    rows = {
        "class": f"`{model_class.stock}` of transformers, `{model_class.ours}` of hf_megatron",
        "parameters": f"{parameters:,}",
        "layers": sizes["num_hidden_layers"],
        "hidden size": f"{hidden:,}",
        "attention heads": f"{heads} of {hidden // heads}",
        "inner size of the MLP": f"{sizes['intermediate_size']:,}",
        "activation": architecture.activation.read(config),
        "vocabulary": f"{sizes['vocab_size']:,}",
        "positions": f"{sizes['max_length']:,}",
        "LayerNorms": f"{'before' if architecture.norms == 'pre' else 'after'} attention and MLP",
        "head": "tied to the embedding" if config.get("tie_word_embeddings", True) else "of its own",
    }
    return table(("", ""), rows.items())


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines: list[Sequence[object]] = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _origin(model: Model) -> str:
    degree = "" if model.format == "hub" else f", tensor-parallel degree {model.tp_size}"
    version = "" if model.checkpoint_version is None else f", checkpoint_version {model.checkpoint_version:g}"
    return f"{model.format}{degree}{version}"
