"""The tables are asked for properties, never for their names; and what they say of Megatron-LM is what is read."""

import re

import pytest

from hf_megatron import architectures
from hf_megatron.architectures import TABLES, Architecture
from hf_megatron.architectures.table import TensorRule
from hf_megatron_conversion.formats.megatron_lm.names import own_name
from tests.repository import ROOT

_CONSTANTS = "|".join(name for name, value in vars(architectures).items() if isinstance(value, Architecture))
_NAMES = "|".join(table.name for table in TABLES)
_ASKS_BY_NAME = re.compile(rf"\bis_(?:{_NAMES})\b|\b(?:{_CONSTANTS})\b|(?:table|architecture)\.name (?:==|in) ")
_OWN_ROOMS = re.compile(r"hf_megatron/(?:architectures|models/\w+)/")
_SIZES = {"vocab_size", "num_positions", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
_RULES = [
    pytest.param(rule, id=f"{table.stock_model_type}-{rule.name}")
    for table in TABLES
    for rule in table.rules
    if rule.megatron is not None
]


def test_nothing_asks_which_architecture_it_is() -> None:
    """Catches behaviour that a third architecture would have to be added to, outside of its table and classes."""
    found = []
    for path in (file for room in ("hf_megatron", "conversion") for file in (ROOT / room).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not _OWN_ROOMS.match(name):
            lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            found += [f"{name}:{number}: {line.strip()}" for number, line in lines if _ASKS_BY_NAME.search(line)]
    assert found == []


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stock_model_type)
def test_sizes_have_one_name_in_all_tables(table: Architecture) -> None:
    """Catches a size under a name of its own, which the planner and the cards would not find."""
    assert table.size_fields.keys() - {"num_token_types"} == _SIZES
    assert {*_SIZES, "max_length", "query_key_value", "num_labels"} <= table.sizes({}).keys()


@pytest.mark.parametrize("rule", _RULES)
def test_megatron_lm_s_names_are_those_that_are_read(rule: TensorRule) -> None:
    """Catches a spelling in a table that the reader never gives to a stored tensor."""
    assert rule.megatron is not None
    name = re.sub(r"[*+]", "3", rule.megatron)
    stored = f"language_model.encoder.{name}" if name.startswith(("layers.", "final_")) else name
    assert own_name(stored) == name


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stock_model_type)
def test_queries_keys_and_values_are_all_of_megatron_lm_s_tensor(table: Architecture) -> None:
    """Catches a third that is missing or there twice, and a part where the whole is meant."""
    for kind in ("weight", "bias"):
        fused = [rule for rule in table.rules if (rule.megatron or "").endswith(f"query_key_value.{kind}")]
        assert [rule.qkv for rule in fused] in ([None], [0, 1, 2])
