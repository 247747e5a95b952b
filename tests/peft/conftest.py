"""Stock models to adapt."""

from __future__ import annotations

import pytest

from tests.models.bert.reference import save_stock_bert
from tests.models.reference import save_stock
from tests.peft.adapters import BERT_TARGETS, GPT2_TARGETS, Case


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every linear layer of a GPT-2 whose inner size no degree divides."""
    directory = save_stock(tmp_path_factory.mktemp("gpt2"), n_inner=101)
    lora = {"target_modules": list(GPT2_TARGETS), "task_type": "CAUSAL_LM"}
    return Case(directory, "GPT2LMHeadModel", "MegatronGPT2LMHeadModel", lora=lora)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every linear layer of a BERT, those behind a shared f and the replicated ones among them."""
    directory = save_stock_bert(tmp_path_factory.mktemp("bert"), "post", "ForMaskedLM")
    return Case(directory, "BertForMaskedLM", "MegatronBertForMaskedLM", lora={"target_modules": list(BERT_TARGETS)})


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A pre-LayerNorm BERT whose head is trained whole beside the adapter, as peft does for classification."""
    directory = save_stock_bert(tmp_path_factory.mktemp("classifier"), "pre", "ForSequenceClassification")
    lora = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "lora_only", "use_rslora": True}
    return Case(directory, "MegatronBertForSequenceClassification", "MegatronBertForSequenceClassification", lora=lora)
