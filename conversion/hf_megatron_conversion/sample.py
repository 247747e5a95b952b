"""Token ids to run two models on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer

_logger = logging.getLogger(__name__)

_SEED = 0
_TEXT = (
    "The lighthouse keeper wrote in his book every evening: the wind, the height of the waves, and which ships had "
    "passed. In forty years he had filled eleven of them. When somebody asked what they were for, he said that a "
    "thing nobody writes down has not quite happened, and went back up the stairs to see whether the lamp was clean."
)


def sample_ids(directories: Sequence[Path], vocab_size: int, length: int) -> torch.Tensor:
    """[1, length] token ids below ``vocab_size``: a text, cut or repeated, with the first tokenizer that is found.

    Without one they are drawn at random.
    """
    for directory in directories:
        try:
            ids = _encoded(directory)
        except Exception as error:
            # Of tokenizers that another version of the library has written, nothing but the text is lost here.
            _logger.info("The tokenizer in %s cannot be used here: %s", directory, error)
            continue
        if ids and max(ids) < vocab_size:
            return torch.tensor([(ids * (length // len(ids) + 1))[:length]])
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(_SEED))


def _encoded(directory: Path) -> list[int]:
    """The text's ids; none if there is no tokenizer."""
    names = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
    files = {name: str(directory / name) for name in names if (directory / name).is_file()}
    if "tokenizer.json" in files:
        tokenizer = Tokenizer.from_file(files["tokenizer.json"])
    elif "vocab.json" in files and "merges.txt" in files:
        tokenizer = ByteLevelBPETokenizer.from_file(files["vocab.json"], files["merges.txt"])
    elif "vocab.txt" in files:
        tokenizer = BertWordPieceTokenizer.from_file(files["vocab.txt"])
    else:
        return []
    ids: list[int] = tokenizer.encode(_TEXT).ids
    return ids
