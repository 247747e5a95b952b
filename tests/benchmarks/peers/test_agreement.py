"""Whether competitors computed the same."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest

from benchmarks.peers.agreement import DifferentWorkError, check_same_work
from benchmarks.peers.competitors import COMPETITORS, Configuration


def _found(**figures: float) -> dict[str, Any]:
    right = {"loss": 10.0, "gradient_norm": 2.0}
    return {"ours-tp1-1t": {"check": [right]}, "dtensor-tp2-1t": {"check": [right, {**right, **figures}]}}


def test_what_rounding_explains_is_the_same() -> None:
    """Catches a tolerance that refuses another order of summation."""
    check_same_work(_found(loss=10.0001, gradient_norm=2.0005), "float32")
    check_same_work(_found(loss=10.02, gradient_norm=2.05), "bfloat16")


@pytest.mark.parametrize("figures", [{"loss": 10.01}, {"gradient_norm": 2.01}, {"loss": nan}])
def test_other_work_is_refused(figures: dict[str, float]) -> None:
    """Catches a peer that lost a bias, or whose backward pass is wrong, or a rank that nobody looked at."""
    with pytest.raises(DifferentWorkError, match=r"of dtensor-tp2-1t, rank 1, is .* that of ours-tp1-1t"):
        check_same_work(_found(**figures), "float32")


def test_configurations_are_written_and_read() -> None:
    """Catches a competitor whose name, which has dashes, is cut in the wrong place."""
    for competitor in COMPETITORS:
        configuration = Configuration(competitor, 4, 2)
        assert Configuration.parse(configuration.name) == configuration


@pytest.mark.parametrize("name", ["ours", "ours-tp2", "theirs-tp2-1t"])
def test_other_names_are_refused(name: str) -> None:
    """Catches a misspelled configuration that is silently not measured."""
    with pytest.raises(ValueError, match="write COMPETITOR-tpRANKS-THREADSt"):
        Configuration.parse(name)
