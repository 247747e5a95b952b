"""Run a function once another package has been imported, now or later."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(package: str, function: Callable[[], object]) -> None:
    """Call ``function`` at once if ``package`` is imported already, otherwise right after its first import."""
    if package in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Finder(package, function))


class _Finder(MetaPathFinder):
    """Finds one package as the other finders do, and has its loader call a function after the first import.

    It stays until then: many libraries look for a package without importing it, and an import may fail.
    """

    def __init__(self, package: str, function: Callable[[], object]) -> None:
        self._package, self._function = package, function

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._package:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def finish(self) -> None:
        """The package has been imported."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._function()


class _Loader(Loader):
    """Loads a module with its own loader, which it leaves in the module, and then tells the finder."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.finish()
