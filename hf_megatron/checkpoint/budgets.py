"""How much a checkpoint's files may ask for. Every limit is here; what is beyond one is refused, with both numbers.

The limits are far above what real checkpoints need. Within them no file makes a reader take more than seconds of CPU
time or hundreds of megabytes of memory, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

# Pickles. A tensor takes about 200 bytes, 25 objects and 40 instructions.
MAX_PICKLE_BYTES = 32 * 2**20
MAX_PICKLE_OBJECTS = 1_000_000  # that are pushed onto the stack
MAX_PICKLE_INSTRUCTIONS = 4_000_000
INDEX_FACTOR = 2  # by which a distributed checkpoint's .metadata may be larger: it lists each rank's part
RESUME_FACTOR = 8  # the same of a training checkpoint of one's own, which may be of more ranks
MAX_NESTING = 16  # dictionaries within dictionaries

# Of pickles and JSON.
MAX_INTEGER_BITS = 64  # with or without a sign
MAX_KEY_LENGTH = 1024  # characters of a dictionary's key, and of a tensor's name
MAX_NAME_LENGTH = 256  # characters of a module or class that a pickle names, and bytes of a file's name

# Archives of torch.save, which hold a file for each tensor.
MAX_ZIP_ENTRIES = 100_000
MAX_ZIP_DIRECTORY_BYTES = 16 * 2**20

MAX_JSON_BYTES = 16 * 2**20
MAX_YAML_BYTES = 256 * 2**10
MAX_YAML_VALUES = 100_000  # of which aliases may make any number of a few
MAX_TOKENIZER_JSON_BYTES = 256 * 2**20
MAX_TRAINER_STATE_BYTES = 256 * 2**20  # which hold what was logged in each step
MAX_CARD_BYTES = 16 * 2**20
MAX_JSON_VALUES = 4_000_000  # by its commas and opening brackets
MAX_JSON_NESTING = 127  # which is serde_json's limit too

MAX_SAFETENSORS_HEADER_BYTES = 16 * 2**20
MAX_SAFETENSORS_HEADERS_BYTES = 96 * 2**20  # of all files of a checkpoint
MAX_TENSORS = 100_000  # in a checkpoint
MAX_PIECES = 500_000  # of tensors that are cut, or of which many layers are one
MAX_DIMENSIONS = 64  # of a tensor, which is torch's limit too
MAX_FILES = 10_000  # with weights, in a checkpoint

# Texts to tokenize.
MAX_DOCUMENT_BYTES = 128 * 2**20  # a text file, a line of JSON, or the text of a row
MAX_DOCUMENT_VALUES = 2_000_000  # texts, and what separates values, in a line of JSON


class BudgetError(ValueError):
    """A file asks for more than a limit allows. Readers turn it into a CheckpointFormatError that names the file."""


def require_within(limit: int, number: int, what: str) -> None:
    """Raise a BudgetError if ``number`` of ``what`` (a plural) is more than ``limit``."""
    if number > limit:
        raise BudgetError(f"it has {number:,} {what}, and the limit is {limit:,}")


def require_files_within(limit: int, paths: Iterable[Path]) -> None:
    """Raise a BudgetError if one of these files has more bytes than ``limit``."""
    for path in paths:
        if path.is_file():
            require_within(limit, path.stat().st_size, f"bytes in {path.name}")


def is_64_bit(number: int) -> bool:
    """Whether an integer fits 64 bits, with or without a sign."""
    return -(1 << MAX_INTEGER_BITS - 1) <= number < 1 << MAX_INTEGER_BITS
