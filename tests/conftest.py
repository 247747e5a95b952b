"""Fixtures for all tests."""

import os
from collections.abc import Callable, Iterator

import pytest

# Before torch, transformers or datasets are imported, here or in the ranks, which inherit the environment. Tests need
# no network, and ranks that share two cores gain nothing from threads.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from tests.distributed import RankPool

# Minutes and half minutes of processes of their own. Whichever worker had one of them last would have the others wait.
_LONGEST = (
    "test_what_the_stock_classes_pass",
    "test_killed_runs_end",
    "test_the_whole_journey",
    "test_blocks_work",
    "test_the_run_for_a_card",
    "test_launchers",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest."""
    items.sort(key=lambda item: not item.name.startswith(_LONGEST))


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], RankPool]]:
    """A function from a world size to its live ranks, which are shared by all tests of the session."""
    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        return pools.setdefault(world_size, RankPool(world_size))

    yield get
    for live in pools.values():
        live.close()
