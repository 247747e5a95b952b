"""What a tokenizer's files say, without the tokenizer."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hf_megatron.checkpoint import read_json
from hf_megatron.checkpoint.budgets import MAX_JSON_BYTES, MAX_JSON_VALUES, MAX_TOKENIZER_JSON_BYTES, require_within
from hf_megatron.checkpoint.regular_file import open_regular
from hf_megatron.errors import CheckpointFormatError

TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
_WITH_TOKENS = ("tokenizer.json", "vocab.json", "vocab.txt")
_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerFacts:
    """What matters to a model: one more than the largest id, and the id of GPT-2's token that ends a text, if any."""

    vocab_size: int
    end_of_text: int | None


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory holds the tokens of a tokenizer."""
    return any((directory / name).is_file() for name in _WITH_TOKENS)


def tokenizer_facts(directory: Path) -> TokenizerFacts | None:
    """Read them from tokenizer.json, vocab.json or vocab.txt; None without, CheckpointFormatError if one is broken."""
    ids: dict[str, Any] = {}
    if (directory / "tokenizer.json").is_file():
        content = _read(directory / "tokenizer.json")
        vocab = _mapping(content.get("model")).get("vocab")
        if isinstance(vocab, list):
            vocab = {str(entry): index for index, entry in enumerate(vocab)}
        ids |= _mapping(vocab)
        added = content.get("added_tokens") or ()
        if not isinstance(added, list | tuple):
            raise CheckpointFormatError(f"added_tokens in {directory / 'tokenizer.json'} is not a list.")
        ids |= {str(_mapping(entry).get("content")): _mapping(entry).get("id") for entry in added}
    elif (directory / "vocab.json").is_file():
        ids |= _read(directory / "vocab.json")
    elif (directory / "vocab.txt").is_file():
        # Not splitlines, which also splits at characters that vocabularies of many languages have as tokens.
        with open_regular(path := directory / "vocab.txt") as file:
            if os.fstat(file.fileno()).st_size > MAX_TOKENIZER_JSON_BYTES:
                raise CheckpointFormatError(
                    f"{path} is larger than any vocabulary; the limit is {MAX_TOKENIZER_JSON_BYTES:,} bytes."
                )
            lines = io.TextIOWrapper(file, encoding="utf-8", errors="replace")
            ids |= {line.rstrip("\n"): index for index, line in enumerate(islice(lines, MAX_JSON_VALUES + 1))}
            if len(ids) > MAX_JSON_VALUES:
                raise CheckpointFormatError(f"{path} has more than {MAX_JSON_VALUES:,} tokens, which is the limit.")
    else:
        return None
    if (directory / "added_tokens.json").is_file():
        ids |= _read(directory / "added_tokens.json")
    numbers = [number for number in ids.values() if type(number) is int and number >= 0]
    if not numbers:
        raise CheckpointFormatError(f"The tokenizer in {directory} has no tokens.")
    end = ids.get(_END_OF_TEXT)
    return TokenizerFacts(1 + max(numbers), end if type(end) is int else None)


def without_auto_map(path: Path) -> bytes | None:
    """What is in a tokenizer_config.json but for ``auto_map``, which names code; None if it has none.

    CheckpointFormatError if it cannot be read.
    """
    with open_regular(path) as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    try:
        require_within(MAX_JSON_BYTES, len(raw), "bytes at least")
        content = json.loads(raw.decode())  # not read_json: the largest length is often 10**30
        if not isinstance(content, dict) or "auto_map" not in content:
            return None
        del content["auto_map"]
        return (json.dumps(content, indent=2) + "\n").encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{path} cannot be read: {error}.") from error


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, MAX_TOKENIZER_JSON_BYTES)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
