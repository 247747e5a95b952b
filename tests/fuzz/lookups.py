"""What Python's and torch's own readers would look up in a pickle, without looking it up."""

from __future__ import annotations

import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch

_UNPICKLER: Any = pickle._Unpickler  # the one in Python, whose parts can be replaced


class _Inert:
    """Stands for everything that a pickle asks for."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    add = append


class Lookups(_UNPICKLER):
    """Python's unpickler, which notes what it is asked to look up, imports nothing, and hashes no tuples."""

    dispatch = dict(_UNPICKLER.dispatch)  # noqa: RUF012
    found: set[tuple[str, str]] = set()  # noqa: RUF012 (torch makes the instances, so the class collects)

    def find_class(self, module: str, name: str) -> Any:
        names = (module, name)
        if self.proto < 3:
            names = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.found.add(names)
        kept = {("torch.storage", "UntypedStorage"): torch.UntypedStorage, ("collections", "OrderedDict"): OrderedDict}
        return kept.get(names, _Inert)

    def persistent_load(self, persistent_id: Any) -> Any:
        return persistent_id

    def _store(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=False):
            # Nested tuples that share their halves would never be hashed.
            self.stack[-1][key if isinstance(key, (str, int)) else id(key)] = value

    def _store_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._store([key, value])

    def _store_items(self) -> None:
        self._store(self.pop_mark())

    def _make_dictionary(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._store(items)

    def _make_set(self) -> None:
        self.stack.append(self.pop_mark())

    def _add_items(self) -> None:
        self.pop_mark()

    dispatch |= {
        ord("s"): _store_item,
        ord("u"): _store_items,
        ord("d"): _make_dictionary,
        0x90: _add_items,
        0x91: _make_set,
    }


def lookups_of(read: Callable[[], object]) -> set[tuple[str, str]]:
    Lookups.found = set()
    with suppress(Exception):  # what it has looked up until then is what counts
        read()
    return Lookups.found


def torch_lookups(path: Path) -> set[tuple[str, str]]:
    """What ``torch.load(weights_only=False)`` would look up, in any of a file's pickles."""
    module = SimpleNamespace(Unpickler=Lookups, load=lambda file, **keywords: Lookups(file, **keywords).load())

    def as_program(*arguments: Any, **keywords: Any) -> None:
        Lookups.found.add(("torch.jit", "load"))

    with patch("torch.jit.load", as_program):
        return lookups_of(lambda: torch.load(path, "cpu", cast(Any, module), weights_only=False))
