"""Every class trains on a GPU without the host once waiting for it."""

import pytest
import torch

from tests.fake_gpu.steps import train
from tests.fake_gpu.tracing import DEVICE, build, fake_gpu
from tests.models.architectures import ARCHITECTURES, ModelCase

_CLASSES = [pytest.param(case, head, id=f"{case.name}-{head}") for case in ARCHITECTURES for head in case.heads]
# Dtype of the weights, of the products if it is another, dropout.
_WAYS = [(torch.bfloat16, None, 0.1), (torch.float32, torch.bfloat16, 0.0), (torch.float32, torch.float16, 0.1)]


@pytest.mark.parametrize(("dtype", "autocast", "dropout"), _WAYS)
@pytest.mark.parametrize("tp_size", [1, 8])
@pytest.mark.parametrize(("case", "head"), _CLASSES)
def test_a_step(
    case: ModelCase, head: str, tp_size: int, dtype: torch.dtype, autocast: torch.dtype | None, dropout: float
) -> None:
    """Catches a value that is read from the device, a shape that depends on one, and a tensor on the CPU."""
    config = case.config(hidden_size=128, num_attention_heads=16, **case.dropout(dropout, dropout))
    with fake_gpu(tp_size) as trace:
        model = build(trace, case.ours(head), config, dtype=dtype)
        batch = {name: torch.zeros(x.shape, dtype=x.dtype, device=DEVICE) for name, x in case.batch(head).items()}
        if head in ("ForPreTraining", "ForMaskedLM"):
            batch["masked_positions"] = batch["labels"][:, :4]
        phases = train(trace, model, batch, autocast=autocast)
        assert all(phases[name].kernels for name in ("forward", "backward", "clipping", "optimizer"))
        assert (phases["forward"].collectives.total() > 0) == (tp_size > 1)
