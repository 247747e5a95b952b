"""Samples in turns: what is dropped, what is compared with what."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any
from unittest.mock import MagicMock

import pytest

from benchmarks.peers import rounds
from benchmarks.peers.rounds import Spread, paired_ratios, sample, take_rounds


def _workers(name: str = "ours-tp2-1t", foreign: Sequence[float] = (), order: list[str] | None = None) -> Any:
    """Two ranks that answer at once; ``foreign`` is what each look at the machine finds."""

    def ask(command: str) -> list[dict[str, Any]]:
        if order is not None:
            order.append(name)
        return [{"step": step, "loss": 2.0, "tokens": []} for step in (1.0, 3.0)]

    fake = MagicMock(**{"waited_seconds.return_value": 0.0, "ask.side_effect": ask})
    fake.name = name
    fake.foreign_load().cores.side_effect = foreign or repeat(0.0)
    return fake


def test_spread() -> None:
    """Catches quartiles of a library's other definition, and a crash on few samples."""
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    assert Spread.of([]) is None


def test_ratios_stay_within_a_round() -> None:
    """Catches ratios of medians, and a dropped sample that shifts the rounds against each other."""
    ours = [{"step": 1.0, "foreign": 0.0}, {"step": 2.0, "foreign": 0.9}, {"step": 3.0, "foreign": 0.0}]
    theirs = [{"step": 2.0, "foreign": 0.0}, {"step": 2.0, "foreign": 0.0}, {"step": 4.0, "foreign": 0.1}]
    assert paired_ratios(ours, theirs, max_foreign_cores=0.15) == [0.5, 0.75]


def test_the_slowest_rank_counts() -> None:
    """Catches the time of rank 0 alone, and lists that end up among the numbers."""
    assert sample(_workers(), "step") == {"step": 3.0, "loss": 2.0, "foreign": 0.0, "waited": 0.0}


def test_a_disturbed_sample_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a disturbed sample that is kept although a second try is quiet."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    workers = _workers(foreign=[0.9, 0.0, 0.1])  # the sample, the wait, the next sample
    assert sample(workers, "step")["foreign"] == 0.1
    assert workers.ask.call_count == 2


def test_after_some_attempts_a_disturbed_sample_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an endless loop on a busy machine, and a disturbed sample that looks like a clean one."""
    monkeypatch.setattr(rounds, "_QUIET_SECONDS", 0.0)
    workers = _workers(foreign=[0.9] * rounds.ATTEMPTS)
    taken = sample(workers, "step")
    assert workers.ask.call_count == rounds.ATTEMPTS
    assert rounds.clean([taken]) == []


def test_rounds_are_complete_and_shuffled() -> None:
    """Catches a configuration left out of a round, and one that always runs after the same other."""
    order: list[str] = []
    fleet = [_workers(name, order=order) for name in "abc"]
    samples = take_rounds(fleet, 8, tell=lambda _: None)
    by_round = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 8, "b": 8, "c": 8}
    assert {"".join(sorted(names)) for names in by_round} == {"abc"}
    assert len(set(by_round)) > 2


def test_no_round_begins_after_the_time() -> None:
    """Catches a limit that is only looked at when all rounds are done."""
    told: list[str] = []
    samples = take_rounds([_workers()], 5, max_seconds=-1.0, tell=told.append)
    assert samples == {"ours-tp2-1t": []}
    assert told == ["stopped after 0 of 5 rounds: -1 s are over"]
