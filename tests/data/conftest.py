"""A BERT tokenizer and documents, made on the spot from text that comes with Python."""

from collections.abc import Iterator
from pydoc_data.topics import topics

import pytest
from transformers import BertTokenizerFast, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_megatron.paper.data import tokenize_sentences

Document = list[list[int]]

_TEXTS = [topics[name] for name in sorted(topics)[:30]]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer with a vocabulary so small that most words have several tokens."""
    return BertTokenizerFast().train_new_from_iterator(_TEXTS, 600, show_progress=False)


@pytest.fixture(scope="session")
def documents(tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    return [tokenize_sentences(tokenizer, text) for text in _TEXTS]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, by transformers' loggers too."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()
