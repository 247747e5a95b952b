"""GPT-2 XL, whose 25 heads no other degree than 5 and 25 divides, in its published sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed import DistributedConfig

from benchmarks.bench_conversion import generate
from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel
from hf_megatron.architectures import GPT2
from hf_megatron.architectures.presets import PRESETS
from hf_megatron.planning import MACHINES, ModelShape, Run
from hf_megatron.planning.planner import layouts
from hf_megatron.tensor_parallel import local, parallelize_module
from hf_megatron_conversion import convert
from tests.live import on_live_ranks
from tests.models.reference import assert_agrees, gradients

_XL = {"n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257, "n_positions": 1024}


def test_eight_ranks_without_data() -> None:
    """Catches a rank with another part than it has to compute with, on the last of eight ranks."""
    config = MegatronGPT2Config.from_preset("gpt2-xl")
    assert {name: getattr(config, name) for name in _XL} == _XL
    with torch.device("meta"):
        model = MegatronGPT2LMHeadModel(config)
    dist.init_process_group("fake", store=FakeStore(), rank=7, world_size=8)
    try:
        parallelize_module(model, init_device_mesh("cpu", (8,)))
    finally:
        dist.destroy_process_group()
    attention: Any = model.transformer.h[47].attn
    assert attention.head_cut.heads == range(21, 25)  # 22 and a half to 25 are 3.125 heads of 64
    assert attention.head_cut.lacking == (56, 0)
    assert local(attention.c_attn.weight).shape == (1600, 600)
    assert local(model.transformer.wte.weight).shape == (50257 - 7 * 6283, 1600)


def test_two_four_and_eight_ranks_are_planned() -> None:
    """Catches a degree that is not offered because it does not divide the heads."""
    shape = ModelShape.from_config(GPT2.config_of({**_XL}, GPT2.classes[0], stock=False))
    found = {plan.run.tp_size for plan in layouts(shape, Run(), MACHINES["a100-80gb"], 8)}
    assert found == {1, 2, 4, 8}


@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_conversion_is_planned(tmp_path: Path, tp_size: int) -> None:
    """Catches a cut that the converter refuses, and columns that are left out or written twice."""
    source = generate(tmp_path / "xl", PRESETS["gpt2-xl"], is_sparse=True)
    conversion = convert(source, tmp_path / "tp", to="tp", tp_size=tp_size, dry_run=True)
    shards = sum(size for name, size in conversion.files.items() if name.endswith(".safetensors"))
    whole = (source / "model.safetensors").stat().st_size
    assert whole <= shards < 1.001 * whole


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [2, 4])
@on_live_ranks(timeout=500)
def test_a_step_of_four_layers(tp_size: int) -> None:
    """Catches sizes of the published model that tiny ones do not have: a step equals that of one process."""
    config = MegatronGPT2Config.from_preset("gpt2-xl", n_layer=4, vocab_size=1009)
    ids = torch.arange(64).view(1, -1) * 13 % 1009
    found: list[Any] = []
    for split in (DistributedConfig(tp_size=tp_size), None):
        model = MegatronGPT2LMHeadModel.from_config(config, distributed_config=split, seed=0)
        torch.manual_seed(1)
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert_agrees("loss", found[0][0], found[1][0])
    for name, gradient in found[1][1].items():
        assert_agrees(name, found[0][1][name], gradient)
