"""GPT-2 XL, whose 25 heads no usual degree divides, with a GPU's fused attention: its sizes, kernels and exchanges."""

import pytest

from tests.fake_gpu.runs import Case, trace


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tp_size", [2, 8])
def test_heads_on_two_ranks(tp_size: int, dropout: float) -> None:
    """Catches a wait for the device, or an exchange too many, where a cut runs through a head."""
    two, three = (trace(Case("gpt2-xl", tp_size=tp_size, layers=layers, dropout=dropout))[1] for layers in (2, 3))
    for phase in ("forward", "backward"):
        added = three[phase].collectives - two[phase].collectives
        assert added == {"all-reduce": 2, "exchange": 1}, added
        kernels = three[phase].kernels - two[phase].kernels
        assert sum(count for name, count in kernels.items() if name.startswith("_scaled_dot_product_")) == 1, kernels
