"""What one layer launches on a GPU, and a decoded token: no more kernels than counted, and the same collectives."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed._symmetric_memory
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_megatron import MegatronGPT2LMHeadModel
from hf_megatron.tensor_parallel import symmetric_memory
from tests.fake_gpu.runs import Case, trace
from tests.fake_gpu.steps import decode
from tests.fake_gpu.tracing import build, fake_gpu

_GPT2, _BERT = Case("gpt2-1.2b"), Case("bert-1.3b")
_SUMS = {"all-reduce": 2}
_SPLIT, _SPLIT_BACK = {"all-gather": 2, "reduce-scatter": 2}, {"all-gather": 4, "reduce-scatter": 2, "all-reduce": 1}
# A run, and of a layer the kernels, as counted, and the collectives, of forward and backward.
_LAYERS = [
    (_GPT2, (12, 21), ({}, {})),
    (replace(_GPT2, precision="amp"), (22, 33), ({}, {})),
    (replace(_GPT2, tp_size=8), (13, 24), (_SUMS, _SUMS)),
    (replace(_GPT2, tp_size=8, sequence_parallel=True), (21, 29), (_SPLIT, _SPLIT_BACK)),
    (_BERT, (14, 28), ({}, {})),
    (replace(_BERT, tp_size=8), (14, 26), (_SUMS, _SUMS)),
    (replace(_BERT, tp_size=8, sequence_parallel=True), (22, 29), (_SPLIT, _SPLIT_BACK)),
]


@pytest.mark.parametrize(("case", "kernels", "collectives"), _LAYERS, ids=str)
def test_a_layer(case: Case, kernels: tuple[int, int], collectives: tuple[dict[str, int], dict[str, int]]) -> None:
    """Catches a copy, a cast or an index that is computed anew in each layer, and a collective too many."""
    two, three = (trace(replace(case, layers=layers))[1] for layers in (2, 3))
    for phase, most, expected in zip(("forward", "backward"), kernels, collectives, strict=True):
        launched = three[phase].kernels - two[phase].kernels
        assert launched.total() <= most, launched
        assert three[phase].collectives - two[phase].collectives == expected


@pytest.mark.parametrize(("backend", "kernel"), [("FLASH_ATTENTION", "flash"), ("EFFICIENT_ATTENTION", "efficient")])
@pytest.mark.parametrize("case", [replace(_GPT2, tp_size=8, layers=2), replace(_BERT, layers=2)], ids=str)
def test_an_attention_kernel(case: Case, backend: str, kernel: str) -> None:
    """Catches a mask or a layout that keeps a fused kernel from being taken, or a wait that only one of them needs."""
    with sdpa_kernel(getattr(SDPBackend, backend)):
        phases = trace(case)[1]
    for phase, suffix in (("forward", ""), ("backward", "_backward")):
        assert phases[phase].kernels[f"_scaled_dot_product_{kernel}_attention{suffix}"] == 2


@pytest.mark.parametrize(("case", "kernels"), [(_GPT2, (25, 29)), (_BERT, (27, 27))], ids=str)
def test_a_layer_over_symmetric_memory(case: Case, kernels: tuple[int, int]) -> None:
    """Catches a collective beside a product that could be one operation with it, and a copy of what it takes."""
    case = replace(case, tp_size=8, sequence_parallel=True)
    with mock.patch.object(symmetric_memory, "_IS_ASKED_FOR", True):
        two, three = (trace(replace(case, layers=layers))[1] for layers in (2, 3))
    gathers, scatters = "fused_all_gather_matmul", "fused_matmul_reduce_scatter"
    for phase, most, collectives in zip(
        ("forward", "backward"), kernels, ({}, {"all-gather": 2, "all-reduce": 1}), strict=True
    ):
        launched = three[phase].kernels - two[phase].kernels
        assert (launched[gathers], launched[scatters]) == (2, 2), launched
        assert launched.total() <= most, launched
        assert three[phase].collectives - two[phase].collectives == collectives


@pytest.mark.parametrize(("tp_size", "expected"), [(1, {}), (8, {"all-reduce": 2})])
def test_a_decoded_token(tp_size: int, expected: dict[str, int]) -> None:
    """Catches a wait for the device, and work that a layer does for a token and need not."""
    found = []
    for layers in (2, 3):
        config = replace(_GPT2, layers=layers).config()
        with fake_gpu(tp_size) as device:
            model = build(device, MegatronGPT2LMHeadModel, config, dtype=torch.bfloat16)
            found.append(decode(device, model, batch_size=2, prompt=64))
    two, three = found
    assert (three.kernels - two.kernels).total() <= 13, three.kernels - two.kernels
    assert three.collectives - two.collectives == expected
