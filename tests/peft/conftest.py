"""Stock models to adapt."""

from typing import Any

import pytest

from tests.models.architectures import BERTS, GPT2
from tests.peft.adapters import BERT_TARGETS, GPT2_TARGETS, Case


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every linear layer of a GPT-2 whose inner size and heads no degree divides."""
    uneven: dict[str, Any] = {"n_inner": 101, "num_attention_heads": 5, "hidden_size": 40}
    directory = GPT2.save_stock(tmp_path_factory.mktemp("gpt2"), **uneven)
    lora = {"target_modules": list(GPT2_TARGETS), "task_type": "CAUSAL_LM"}
    return Case(directory, GPT2, "LMHeadModel", lora=lora)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every linear layer of a BERT, those behind a shared f and the replicated ones among them."""
    directory = BERTS[1].save_stock(tmp_path_factory.mktemp("bert"), "ForMaskedLM")
    return Case(directory, BERTS[1], "ForMaskedLM", lora={"target_modules": list(BERT_TARGETS)})


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A pre-LayerNorm BERT whose head is trained whole beside the adapter, as peft does for classification."""
    directory = BERTS[0].save_stock(tmp_path_factory.mktemp("classifier"), "ForSequenceClassification")
    lora = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "lora_only", "use_rslora": True}
    return Case(directory, BERTS[0], "ForSequenceClassification", lora=lora)


@pytest.fixture
def case(request: pytest.FixtureRequest, gpt2: Case, bert: Case, classifier: Case) -> Case:
    """The one that a test is parametrised with by name."""
    return {"gpt2": gpt2, "bert": bert, "classifier": classifier}[request.param]
