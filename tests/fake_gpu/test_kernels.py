"""What one layer launches on a GPU, and a decoded token: no more kernels than were counted, and the same collectives."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from hf_megatron import MegatronGPT2LMHeadModel
from tests.fake_gpu.runs import Case, trace
from tests.fake_gpu.steps import decode
from tests.fake_gpu.tracing import build, fake_gpu

_GPT2, _BERT = Case("gpt2-1.2b"), Case("bert-1.3b")
_ALL_REDUCES, _SPLIT = {"all-reduce": 2}, {"all-gather": 2, "reduce-scatter": 2}
_SPLIT_BACK = {"all-gather": 4, "reduce-scatter": 2, "all-reduce": 1}
# A run, and of a layer the kernels of forward and backward, and the collectives of each.
_LAYERS = [
    (_GPT2, (16, 20), {}, {}),
]


def _of_a_layer(case: Case, phase: str) -> tuple[Counter[str], Counter[str]]:
    """Kernels and collectives that a third layer adds to two."""
    two, three = (trace(replace(case, layers=layers))[1][phase] for layers in (2, 3))
    return three.kernels - two.kernels, three.collectives - two.collectives


@pytest.mark.parametrize(("case", "kernels", "forward", "backward"), _LAYERS, ids=str)
def test_a_layer(
    case: Case, kernels: tuple[int, int], forward: dict[str, int], backward: dict[str, int]
) -> None:
    """Catches a copy, a cast or an index that is computed anew in each layer, and a collective too many."""
    for phase, most, expected in (("forward", kernels[0], forward), ("backward", kernels[1], backward)):
        launched, collectives = _of_a_layer(case, phase)
        assert launched.total() <= most, launched
        assert collectives == expected


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
    assert (three.kernels - two.kernels).total() <= 18, three.kernels - two.kernels
    assert three.collectives - two.collectives == expected
