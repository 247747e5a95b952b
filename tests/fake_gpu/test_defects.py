"""The tests of this directory notice what they are there for."""

from collections.abc import Callable

import pytest
import torch

from hf_megatron.models.gpt2.modeling_gpt2 import MegatronGPT2MLP
from tests.fake_gpu.runs import Case, difference, plan, trace
from tests.fake_gpu.tracing import DEVICE, WaitError

_CASE = Case("gpt2-1.2b", 8, layers=2, micro_batch=8)
_Defect = Callable[[torch.Tensor], torch.Tensor]


def _plant(monkeypatch: pytest.MonkeyPatch, defect: _Defect) -> None:
    """Behind each MLP."""
    forward = MegatronGPT2MLP.forward
    monkeypatch.setattr(MegatronGPT2MLP, "forward", lambda self, *args: defect(forward(self, *args)))


def _reading(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def _choosing(x: torch.Tensor) -> torch.Tensor:
    return x + x[x > 0].sum()


def _asking(x: torch.Tensor) -> torch.Tensor:
    return x if (x > 0).any() else -x


def _sending(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor(2.0, device=DEVICE)


def _fetching(x: torch.Tensor) -> torch.Tensor:
    return x + x.cpu().sum().to(DEVICE, non_blocking=True)


@pytest.mark.parametrize("defect", [_reading, _choosing, _asking, _sending, _fetching])
def test_a_wait(defect: _Defect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a trace that lets the host wait for the device."""
    _plant(monkeypatch, defect)
    with pytest.raises(WaitError):
        trace(_CASE)


def test_a_cpu_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a trace that computes with tensors of two devices."""
    _plant(monkeypatch, lambda x: x + torch.ones(x.shape[-1]))
    with pytest.raises(RuntimeError, match="device"):
        trace(_CASE)


def test_a_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a driver that lets the host wait for all of the device's work."""

    def defect(x: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()
        return x

    _plant(monkeypatch, defect)
    with pytest.raises(RuntimeError, match="not permitted"):
        trace(_CASE)


@pytest.mark.parametrize(
    ("defect", "kind"),
    [
        (lambda x: x.sigmoid() * x, "activations"),  # one more of the size of the hidden states, and x itself
        (lambda x: x + x.new_ones(40, *x.shape).sum(0), "peak"),
    ],
)
def test_a_tensor_too_many(defect: _Defect, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a comparison with the plan that would let a saved tensor pass, or a moment with more than is planned."""
    assert difference(trace(_CASE)[0], plan(_CASE)) == ""
    _plant(monkeypatch, defect)
    assert kind in difference(trace(_CASE)[0], plan(_CASE))
