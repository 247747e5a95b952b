"""Tests whose body runs on live ranks."""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from tests.models.reference import run_at


def on_live_ranks(num_ranks: int | None = None, timeout: float = 60.0) -> Callable[[Callable[..., None]], Any]:
    """Run the body of a test on every rank of a world; what its fixtures and parameters give has to travel there.

    Args:
        num_ranks: how many; without it as many as the parameter ``world_size`` of the test says, or ``tp_size``, or
            ``at.tp_size``. Of the last two 1 means this process, without any process group.
        timeout: seconds.
    """

    def decorate(test: Callable[..., None]) -> Any:
        @functools.wraps(test)
        def start(pool: Any, **arguments: Any) -> None:
            job = (_run_body, test.__module__, test.__name__, arguments)
            if size := num_ranks or arguments.get("world_size"):
                pool(size).run(*job, timeout=timeout)
            else:
                size = arguments["tp_size"] if "tp_size" in arguments else arguments["at"].tp_size
                run_at(pool, size, *job, timeout=timeout)

        parameters = inspect.signature(test).parameters.values()
        start.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("pool", inspect.Parameter.POSITIONAL_OR_KEYWORD), *parameters]
        )
        return start

    return decorate


def _run_body(module: str, name: str, arguments: dict[str, Any]) -> None:
    inspect.unwrap(getattr(importlib.import_module(module), name))(**arguments)
