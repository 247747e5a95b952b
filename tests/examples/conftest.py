"""A BERT so small that an example trains it in seconds."""

import re
import string
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a stock BERT with random weights, without dropout, and of its tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-bert")
    # Words of the Python manual and single characters. Trained vocabularies differ a little from process to process.
    words = Counter(re.findall("[a-z]+", topics["import"].lower() + topics["assert"].lower()))
    characters = sorted(set(string.digits + string.punctuation + string.ascii_lowercase))
    continuations = [f"##{letter}" for letter in string.ascii_lowercase]
    common = [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0])) if len(word) > 1]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *continuations, *common[:500]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=64)
    tokenizer.save_pretrained(directory)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **dropout, initializer_range=0.1)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def text_files(tmp_path: Path) -> list[str]:
    """Two documents."""
    files = []
    for name in ("assert", "import"):
        file = tmp_path / f"{name}.txt"
        file.write_text(topics[name], encoding="utf-8")
        files.append(str(file))
    return files
