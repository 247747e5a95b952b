"""Whether competitors computed the same; if not, their times cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["TOLERANCES", "DifferentWorkError", "check_same_work"]

# How far losses and gradient norms of the same work may lie apart, relatively. In bfloat16 every operation rounds to 8
# bits, and competitors round in different places; some round the loss itself, half a percent of which is lost.
TOLERANCES = {
    "float32": {"loss": 1e-4, "gradient_norm": 1e-3},
    "float16": {"loss": 1e-3, "gradient_norm": 1e-2},
    "bfloat16": {"loss": 1e-2, "gradient_norm": 5e-2},
}


class DifferentWorkError(Exception):
    """Two competitors did not compute the same."""


def check_same_work(found: Mapping[str, Mapping[str, Any]], dtype: str) -> None:
    """Compare every rank's loss and gradient norm with those of the first configuration.

    Args:
        found: By configuration, the workers' replies to ``check`` under that name.
        dtype: Of the matrix products.

    Raises:
        DifferentWorkError: One of them is too far away, or not a number.
    """
    ranks = [(name, number, reply) for name, seen in found.items() for number, reply in enumerate(seen["check"])]
    for name, number, reply in ranks:
        for figure, tolerance in TOLERANCES[dtype].items():
            first = ranks[0][2][figure]
            if not abs(reply[figure] - first) <= tolerance * abs(first):  # said so that NaN is refused too
                raise DifferentWorkError(
                    f"{figure} of {name}, rank {number}, is {reply[figure]:.7g}, that of {ranks[0][0]} {first:.7g}: "
                    f"further apart than {tolerance:g}, relatively."
                )
