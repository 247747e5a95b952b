"""Runs of several passes over a data set of known length, interrupted in a later one."""

from pathlib import Path
from typing import Any

import pytest

from tests.models.reference import Pool
from tests.training.runs import LAYOUTS, Run, assert_close, assert_same_steps, layouts, on_ranks, train


@pytest.mark.parametrize("name", ["one", *layouts("tp2 x replicate2", "tp2", "tp2 x fsdp2")])
def test_a_later_pass_is_resumed_in_its_own_order(pool: Pool, gpt2: Path, tmp_path: Path, name: str) -> None:
    """Catches a resumed run that sees the order of the first pass again, in which it has seen all of it."""
    arguments: dict[str, Any] = {"max_steps": 15, "save_steps": 9}  # of 6 steps a pass
    run = Run(gpt2, tmp_path / "whole", layout=LAYOUTS.get(name, {}), arguments=arguments)
    steps, weights = on_ranks(pool, train, run)
    resumed = Run(
        gpt2, tmp_path / "rest", layout=run.layout, arguments=arguments, resume=tmp_path / "whole" / "checkpoint-9"
    )
    rest, found = on_ranks(pool, train, resumed)
    assert_same_steps(rest, steps[9:])
    assert_close(found, weights)
