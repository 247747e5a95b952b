"""Which cases of a grid every change has to pass, and which only `make test-all` runs."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(cases: Iterable[tuple[Any, ...]], chosen: Collection[tuple[Any, ...]]) -> list[Any]:
    """All `cases`, as parameters of a test; those that are not `chosen` are slow.

    Raises:
        ValueError: a chosen case is none of the cases, so that it would silently not run.
    """
    grid = list(cases)
    unknown = [case for case in chosen if case not in grid]
    if unknown:
        raise ValueError(f"not among the cases: {unknown}")
    return [pytest.param(*case, marks=() if case in chosen else pytest.mark.slow) for case in grid]


def cases(names: str, grid: Iterable[tuple[Any, ...]], chosen: Collection[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """Parametrize a test over a grid of cases, of which those that are not `chosen` are slow."""
    return pytest.mark.parametrize(names, quick(grid, chosen))
