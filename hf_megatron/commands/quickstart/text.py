"""Real English text that comes with every Python, and a tokenizer trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_megatron.errors import UnsupportedError

if TYPE_CHECKING:
    import torch


END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 1009  # odd on purpose: shards of a vocabulary need not be equal
HELD_OUT_EVERY = 12  # every twelfth topic, about 8% of the text, is kept for evaluation


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to evaluate on."""

    train: list[str]
    held_out: list[str]


def read_corpus() -> Corpus:
    """The help topics of Python's reference, the text behind ``help("with")``; UnsupportedError if there are none."""
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:  # as in some minimal distributions
        raise UnsupportedError(
            "this Python has no pydoc_data.topics, the text the quickstart trains on; install the full standard "
            "library (python.org, or your distribution's python3 package rather than its minimal one)."
        ) from error
    documents = [topics[name] for name in sorted(topics)]
    return Corpus([text for i, text in enumerate(documents) if i % HELD_OUT_EVERY], documents[::HELD_OUT_EVERY])


def train_tokenizer(corpus: Corpus, directory: Path) -> Any:
    """Train a byte-level BPE like GPT-2's on the training documents, save it in the Hub's format and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2TokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train, trainer)
    fast = GPT2TokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )
    fast.save_pretrained(directory)
    return fast


def pack(tokenizer: Any, documents: list[str], length: int) -> torch.Tensor:
    """[N, length] token ids: documents joined by the end-of-text token, and cut; a shorter rest is dropped."""
    import torch

    ids = [token for text in documents for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
