"""Pipelines of transformers: they find the classes of this package, and answer as with stock ones."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

import hf_megatron  # noqa: F401 (registers the classes)
from tests.models.architectures import ARCHITECTURES, ModelCase, StockDir, V


def _answers(pipe: Any, case: ModelCase) -> list[Any]:
    if case.is_causal:
        return [found["generated_text"] for found in pipe("5 17 9", max_new_tokens=6, do_sample=False)]
    return [found["token"] for found in pipe("5 17 [MASK] 9")]


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_pipeline_answers_as_with_stock(stock_dir: StockDir, tmp_path: Path, case: ModelCase) -> None:
    """Catches classes that a pipeline does not find in a directory, and answers other than those of stock."""
    vocabulary = {token: id_ for id_, token in enumerate(("[PAD]", "[MASK]", *map(str, range(2, V))))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]")
    directory = stock_dir(case, case.language_model)
    case.load(directory, head=case.language_model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = "text-generation" if case.is_causal else "fill-mask"
    ours = pipeline(task, model=str(tmp_path))
    stock = pipeline(task, model=case.load_stock(directory, case.language_model).eval(), tokenizer=tokenizer)
    assert type(ours.model) is case.ours(case.language_model)
    assert _answers(ours, case) == _answers(stock, case)
