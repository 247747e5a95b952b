"""The Auto classes: ours for our ``model_type``, and stock transformers as if this package were not there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoTokenizer, BertTokenizerFast, GPT2TokenizerFast
from transformers.distributed import DistributedConfig

from hf_megatron.models.registration import register
from tests.models.architectures import ARCHITECTURES, BERTS, GPT2, ModelCase, StockDir
from tests.models.reference import Pool, Tensors, assert_all_equal, full_weights, run_at
from tests.repository import environment


@pytest.mark.parametrize(("case", "head"), [(case, head) for case in ARCHITECTURES for head in case.heads])
def test_auto_classes(stock_dir: StockDir, tmp_path: Path, case: ModelCase, head: str) -> None:
    """Catches a head that is not registered, a directory that comes back as another class, and stock taken over."""
    register()  # a second time changes nothing
    auto, stock = case.auto(head), stock_dir(case, head)
    ours = case.ours(head).config_class
    config = ours.from_pretrained(stock)
    assert type(auto.from_config(config)) is case.ours(head)
    model = auto.from_pretrained(stock, config=config)
    assert type(model) is case.ours(head)
    model.save_pretrained(tmp_path)
    again, saved = auto.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert (type(again), type(saved)) == (case.ours(head), ours)
    assert {name: getattr(saved, name) for name in case.table.own_config} == case.table.own_config
    assert_all_equal(full_weights(again), full_weights(model))

    assert type(AutoConfig.from_pretrained(stock)) is case.stock().config_class
    assert type(auto.from_config(case.stock_config())) is case.stock(head)
    assert type(auto.from_pretrained(stock)) is case.stock(head)


@pytest.mark.parametrize(
    ("case", "auto"),
    [
        (GPT2, "AutoModelForMaskedLM"),
        *((case, f"AutoModelFor{head}") for case in BERTS for head in ("CausalLM", "NextSentencePrediction")),
    ],
)
def test_heads_that_are_not_offered_raise(stock_dir: StockDir, tmp_path: Path, case: ModelCase, auto: str) -> None:
    """Catches a stock model built quietly: stock has these heads, under the name of our configuration's export."""
    auto_class, config = getattr(transformers, auto), case.ours().config_class.from_pretrained(stock_dir(case))
    config.save_pretrained(tmp_path)
    for make in (
        lambda: auto_class.from_config(config),
        lambda: auto_class.from_pretrained(tmp_path),
        lambda: auto_class.from_pretrained(stock_dir(case), config=config),
    ):
        with pytest.raises(ValueError, match=r"Unrecognized configuration class .*"):
            make()


def _auto_load(case: ModelCase, stock: Path, directory: Path, tp_size: int) -> list[Tensors]:
    """A stock directory with our config, and one of ours without, each on this many ranks."""
    layouts: tuple[object, ...] = (None,)
    if tp_size > 1:
        layouts = (DistributedConfig(tp_size=tp_size), {"tp_size": tp_size}, DistributedConfig(tp_plan="auto"))
    auto, results = case.auto(case.heads[0]), []
    for layout in layouts:
        for model in (
            auto.from_pretrained(
                stock, config=case.ours().config_class.from_pretrained(stock), distributed_config=layout
            ),
            auto.from_pretrained(directory, distributed_config=layout),
            case.ours().from_pretrained(stock, distributed_config=layout),
        ):
            assert type(model) is case.ours()
            assert (model.tp_size or 1) == tp_size
            assert model.config.model_type == case.table.model_type
            results.append(full_weights(model))
    return results


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("case", [GPT2, BERTS[1]])
def test_auto_loads_on_ranks(pool: Pool, stock_dir: StockDir, tmp_path: Path, case: ModelCase, tp_size: int) -> None:
    """Catches the Auto class going its own way with ``config=`` or ``distributed_config=``."""
    pool(2).run(case.save_distributed, stock_dir(case), tmp_path, 2)
    expected = full_weights(case.load(stock_dir(case)))
    for results in run_at(pool, tp_size, _auto_load, case, stock_dir(case), tmp_path, tp_size):
        for weights in results:
            assert_all_equal(weights, expected)


@pytest.mark.parametrize("files", ["all", "vocabulary only"])
@pytest.mark.parametrize(("case", "kind"), [(GPT2, GPT2TokenizerFast), (BERTS[0], BertTokenizerFast)])
def test_auto_tokenizer(tmp_path: Path, case: ModelCase, kind: Any, files: str) -> None:
    """Catches a directory of ours whose tokenizer AutoTokenizer cannot find, with and without its own config file."""
    texts = ["to be or not to be, that is the question"] * 3
    tokenizer = kind().train_new_from_iterator(texts, 280, show_progress=False)
    case.config().save_pretrained(tmp_path)
    if files == "all":
        tokenizer.save_pretrained(tmp_path)
    else:
        tokenizer.backend_tokenizer.model.save(str(tmp_path))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, kind)
    assert loaded("not the", "question").data == tokenizer("not the", "question").data


# Loads every stock directory through every Auto class that takes it, before and after the import.
_BEFORE_AND_AFTER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto

AUTO = [name for name in dir(transformers) if name.startswith("AutoModel") and "TF" not in name]
STOCK = (transformers.BertConfig, transformers.MegatronBertConfig, transformers.GPT2Config)

def state():
    report = {"attention": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())}
    for config_class in STOCK:
        for name in AUTO:
            mapping = getattr(getattr(transformers, name), "_model_mapping", {})
            report[config_class.__name__ + name] = repr(mapping[config_class]) if config_class in mapping else None
        report[config_class.__name__] = repr(tokenization_auto.TOKENIZER_MAPPING[config_class])
    for path, (auto, ids) in json.loads(sys.argv[1]).items():
        model, info = getattr(transformers, auto).from_pretrained(path, output_loading_info=True)
        config = transformers.AutoConfig.from_pretrained(path)
        output = model(torch.tensor(ids)).to_tuple()[0].double()
        report[path] = [repr(type(model)), repr(type(model.config)), repr(type(config)), config.to_dict(), str(info)]
        report[path] += [output.sum().item(), output.abs().max().item(), model._tp_plan]
    return report

before = state()
assert "hf_megatron" not in sys.modules
import hf_megatron
from hf_megatron import MegatronBertForPreTraining, MegatronGPT2LMHeadModel
after = state()
assert before == after, [(key, before[key], after[key]) for key in before if before[key] != after[key]]
"""


@pytest.mark.slow
def test_importing_changes_nothing_about_stock(tmp_path: Path) -> None:
    """Catches a stock model that this package's mere presence turns into another one."""
    directories = {}
    for case in ARCHITECTURES:
        for head in (*case.heads, *(() if case.is_causal else ("ForNextSentencePrediction",))):
            path = case.save_stock(tmp_path / case.name / head, head)
            directories[str(path)] = (case.auto(head).__name__, case.inputs(head, "none")["input_ids"].tolist())
    command = [sys.executable, "-c", _BEFORE_AND_AFTER, json.dumps(directories)]
    finished = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-4000:]
