"""Saving: what stock transformers loads, what any other layout loads, and what conversion makes of either."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_megatron import MegatronBertForPreTraining
from hf_megatron_conversion import convert
from tests.models.bert.reference import (
    HEADS,
    PLACEMENTS,
    BertDir,
    Tensors,
    auto_class,
    make_inputs,
    our_class,
    save_stock_bert,
    stock_class,
)
from tests.models.reference import Pool, assert_agrees, assert_all_equal, full_weights, layout, run_at
from tests.tiers import quick


def _save(source: Path, directory: Path, head: str, tp_size: int, fsdp_size: int = 1, **options: bool) -> None:
    model = our_class(head).from_pretrained(source, distributed_config=layout(tp_size, fsdp_size))
    model.save_pretrained(directory, **options)


_SAVED = [
    *(("ForPreTraining", variant, tp_size) for variant, tp_size in (("base", 2), ("untied", 1), ("untied", 4))),
    *((head, "base", 2) for head in HEADS if head != "ForPreTraining"),
    ("ForMaskedLM", "untied", 2),
]


@pytest.mark.parametrize(
    ("placement", "head", "variant", "tp_size"),
    quick(
        ((placement, *saved) for placement in PLACEMENTS for saved in _SAVED),
        [("pre" if i % 2 else "post", *saved) for i, saved in enumerate(_SAVED)],
    ),
)
def test_the_stock_class_loads_what_is_saved(
    pool: Pool, bert_dir: BertDir, tmp_path: Path, placement: str, head: str, variant: str, tp_size: int
) -> None:
    """Catches a second copy of the decoder or its bias, a tensor of ours, and parts gathered in the wrong order."""
    stock = bert_dir(placement, head, variant)
    run_at(pool, tp_size, _save, stock, tmp_path, head, tp_size)
    original = load_file(stock / "model.safetensors")
    assert_all_equal(load_file(tmp_path / "model.safetensors"), original)
    model, info = stock_class(placement, head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_all_equal({name: value for name, value in full_weights(model).items() if name in original}, original)


@pytest.mark.parametrize(
    ("placement", "head"),
    quick(itertools.product(PLACEMENTS, ("Model", "ForPreTraining")), [("pre", "Model"), ("post", "ForPreTraining")]),
)
def test_config_says_what_was_asked(pool: Pool, bert_dir: BertDir, tmp_path: Path, placement: str, head: str) -> None:
    """Catches a layout, or anything else of ours, that leaks into a stock config.json; and a placement that is lost."""
    stock = bert_dir(placement, head)
    original = json.loads((stock / "config.json").read_text())
    changes = {
        "model_type": "megatron_bert",
        "architectures": [f"MegatronBert{head}"],
        "layernorm_placement": placement,
    }
    for options, expected in (({}, {**original, **changes}), ({"stock": True}, original)):
        run_at(pool, 2, _save, stock, tmp_path, head, 2, **options)
        saved = json.loads((tmp_path / "config.json").read_text())
        # Of the entries that one of the stock configurations does not know, None is written.
        assert _without_none(saved) == _without_none(expected)


def _without_none(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}


_LOAD_WITHOUT_US = """
import sys
sys.modules["hf_megatron"] = sys.modules["hf_megatron_conversion"] = None  # importing them raises ImportError
import json, torch, transformers
root, directories = sys.argv[1], json.loads(sys.argv[2])
outputs = {}
for path, (auto, name) in directories.items():
    model, info = getattr(transformers, auto).from_pretrained(f"{root}/{path}", output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.") and type(model).__name__ == name, model
    assert not any(info.values()), (path, info)
    inputs = torch.load(f"{root}/inputs-{'MultipleChoice' in name}.pt")
    outputs[path] = model(**inputs).to_tuple()[0].detach()
torch.save(outputs, f"{root}/outputs.pt")
"""


def _save_to_leave(root: Path, tp_size: int) -> None:
    for placement in PLACEMENTS:
        for head in HEADS:
            _save(root / "stock" / placement / head, root / "left" / placement / head, head, tp_size, stock=True)
        head = "ForPreTraining"
        _save(root / "stock" / placement / head, root / "tp" / placement, head, tp_size, distributed_checkpoint=True)


@pytest.mark.slow
def test_it_loads_without_this_package(pool: Pool, tmp_path: Path) -> None:
    """Catches a user who cannot leave: `save_pretrained(stock=True)` and `--to hub` need this package to be loaded."""
    for placement in PLACEMENTS:
        for head in HEADS:
            save_stock_bert(tmp_path / "stock" / placement / head, placement, head)
    pool(2).run(_save_to_leave, tmp_path, 2, timeout=120)
    directories, expected = {}, {}
    for placement in PLACEMENTS:
        for head in HEADS:
            model = stock_class(placement, head).from_pretrained(tmp_path / "stock" / placement / head)
            directories[f"left/{placement}/{head}"] = (auto_class(head), type(model).__name__)
            expected[f"left/{placement}/{head}"] = model(**make_inputs(head)).to_tuple()[0].detach()
        convert(tmp_path / "tp" / placement, tmp_path / "hub" / placement, to="hub")
        for paths in (directories, expected):
            paths[f"hub/{placement}"] = paths[f"left/{placement}/ForPreTraining"]
    for is_choice in (True, False):
        torch.save(make_inputs("ForMultipleChoice" if is_choice else "Model"), tmp_path / f"inputs-{is_choice}.pt")
    command = [sys.executable, "-W", "ignore", "-c", _LOAD_WITHOUT_US, str(tmp_path), json.dumps(directories)]
    environment = {**os.environ, "PYTHONPATH": ""}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    outputs = torch.load(tmp_path / "outputs.pt")
    assert outputs.keys() == expected.keys()
    for path, output in outputs.items():
        assert_agrees(path, output, expected[path])


def _load_weights(directory: Path, tp_size: int, fsdp_size: int) -> Tensors:
    return full_weights(
        MegatronBertForPreTraining.from_pretrained(directory, distributed_config=layout(tp_size, fsdp_size))
    )


@pytest.mark.parametrize(
    ("placement", "variant", "saved_at"),
    [
        ("post", "untied", (2, 2)),
        pytest.param("pre", "base", (4, 1), marks=pytest.mark.slow),
        *(
            pytest.param(placement, variant, saved_at, marks=pytest.mark.slow)
            for placement, variant in (("pre", "untied"), ("post", "base"))
            for saved_at in ((1, 1), (2, 1), (4, 1), (2, 2))
        ),
    ],
)
def test_a_tp_directory_loads_at_any_layout(
    pool: Pool, bert_dir: BertDir, tmp_path: Path, placement: str, variant: str, saved_at: tuple[int, int]
) -> None:
    """Catches boxes put together in the wrong order, and a bias that is not cut where its decoder is."""
    stock, directory = bert_dir(placement, "ForPreTraining", variant), tmp_path / "tp"
    arguments = (stock, directory, "ForPreTraining", *saved_at)
    run_at(pool, saved_at[0] * saved_at[1], _save, *arguments, distributed_checkpoint=True)
    expected = load_file(stock / "model.safetensors")
    for load_at in ((1, 1), (2, 1), (4, 1), (2, 2)):
        for weights in run_at(pool, load_at[0] * load_at[1], _load_weights, directory, *load_at):
            assert_all_equal(weights, expected)


@pytest.mark.parametrize("variant", ["base", "untied"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_conversion_over_several_degrees_is_exact(
    bert_dir: BertDir, tmp_path: Path, placement: str, variant: str
) -> None:
    """Catches a tensor cut or joined at the wrong place: the file that comes out is the one that went in."""
    stock = bert_dir(placement, "ForPreTraining", variant)
    convert(stock, tmp_path / "tp4", to="tp", tp_size=4)
    convert(tmp_path / "tp4", tmp_path / "tp3", to="tp", tp_size=3)
    convert(tmp_path / "tp3", tmp_path / "hub", to="hub")
    assert (tmp_path / "hub/model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()
    configs = [json.loads((directory / "config.json").read_text()) for directory in (tmp_path / "hub", stock)]
    assert configs[0] == configs[1]
