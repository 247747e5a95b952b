"""The paper's counts on the paper's data.

The data is not part of the repository, so this module is collected only where HF_MEGATRON_EVALUATION_DATA is set (see
conftest.py). It names a directory with ``wiki.test.tokens`` of WikiText-103, ``lambada_test.jsonl``, and GPT-2's
``vocab.json`` and ``merges.txt``, in it or below it.
"""

import os
from pathlib import Path

from transformers import GPT2TokenizerFast

from hf_megatron.paper.evaluation import Passage, detokenize_wikitext, read_passages
from hf_megatron.paper.evaluation.scoring import encode

_ROOT = Path(os.environ["HF_MEGATRON_EVALUATION_DATA"])


def _file(name: str) -> Path:
    # GPT-2's files are the ones with its vocabulary; another tokenizer's may lie beside them.
    found = [path for path in sorted(_ROOT.rglob(name)) if name != "vocab.json" or path.parent.name == "gpt2"]
    assert found, f"there is no {name} below {_ROOT}"
    return found[0]


def test_wikitext_103() -> None:
    """Catches a detokenizer, a tokenizer or a count that is not the paper's: T_o = 245,566 and T = 270,329."""
    text = _file("wiki.test.tokens").read_bytes().decode("utf-8")
    assert len(text.strip().split(" ")) == 245_566
    tokenizer = GPT2TokenizerFast.from_pretrained(_file("vocab.json").parent)
    detokenised = detokenize_wikitext(text)
    ids = encode(tokenizer, detokenised)
    assert len(ids) - 1 == 270_329
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == detokenised


def test_lambada() -> None:
    """Catches examples lost or cut at the wrong place: 5,153 of them, each ending in one word."""
    texts = read_passages(_file("lambada_test.jsonl"))
    passages = [Passage.split(text) for text in texts]
    assert len(passages) == 5_153
    assert all(passage.context + passage.target == text for passage, text in zip(passages, texts, strict=True))
    assert all(len(passage.target.split()) == 1 for passage in passages)
