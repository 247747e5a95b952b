"""The private names of other libraries that this package uses are there, as they were, and all of them are known."""

import ast
import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator
from typing import Any

import pytest

from hf_megatron.private_interfaces import PRIVATE_INTERFACES, PrivateInterface
from tests.repository import ROOT

_SOURCES = [*ROOT.glob("hf_megatron/**/*.py"), *ROOT.glob("conversion/hf_megatron_conversion/**/*.py")]
_PACKAGES = ("hf_megatron", "hf_megatron_conversion")
_IDS = [f"{interface.owner}.{interface.name}" for interface in PRIVATE_INTERFACES]
_OF_C = (types.GetSetDescriptorType, types.MethodDescriptorType)  # attributes that cannot be taken away
_OUR_MARKS = {"_is_averaged"}  # that this package leaves on other libraries' objects


def _resolve(path: str) -> tuple[Any, str, Any]:
    """(what holds it, its name there, the object itself) of a dotted path."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        holder, name = None, ""
        for name in parts[count:]:
            holder, found = found, inspect.getattr_static(found, name)
        return holder, name, found
    raise ModuleNotFoundError(path)


def _check(interface: PrivateInterface) -> None:
    """The tripwire: what an upgrade of a library has to pass."""
    path = f"{interface.owner}.{interface.name}"
    _, _, owner = _resolve(interface.owner)
    assert _has(owner, interface.name), f"{path} is gone. It serves {interface.breaks}."
    if interface.parameters:
        found = list(inspect.signature(getattr(owner, interface.name)).parameters)
        assert tuple(found[: len(interface.parameters)]) == interface.parameters, (
            f"{path} takes {found} now, not {list(interface.parameters)}. It serves {interface.breaks}."
        )


def _has(owner: Any, name: str) -> bool:
    """Whether a module or class has the name, or a function's code mentions it."""
    if isinstance(owner, (property, classmethod)):
        owner = owner.fget if isinstance(owner, property) else owner.__func__
    if inspect.isfunction(owner):
        return name in inspect.getsource(owner)
    return hasattr(owner, name)


@pytest.mark.parametrize("interface", PRIVATE_INTERFACES, ids=_IDS)
def test_private_interfaces_are_as_they_were(interface: PrivateInterface) -> None:
    """Catches a release of another library that removes, renames or changes a private name this package uses."""
    _check(interface)


@pytest.mark.parametrize("interface", PRIVATE_INTERFACES, ids=_IDS)
def test_a_missing_interface_is_named(interface: PrivateInterface, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tripwire that cannot fail: the name is taken away, and has to be asked for."""
    holder, name, owner = _resolve(interface.owner)
    having = [base for base in getattr(owner, "__mro__", [owner]) if interface.name in getattr(base, "__dict__", ())]
    if having and not any(isinstance(vars(base)[interface.name], _OF_C) for base in having if inspect.isclass(base)):
        for base in having:
            monkeypatch.delattr(base, interface.name)
    else:  # a function that uses the name, or a class made in C, which cannot be changed
        monkeypatch.setattr(holder, name, type("Empty", (), {}))
    with pytest.raises(AssertionError, match=rf"{interface.name} is gone\. It serves {interface.breaks[:10]}"):
        _check(interface)


def test_all_private_names_are_in_the_table() -> None:
    """Catches a private name of another library that the source uses and the table does not know."""
    known = {interface.name for interface in PRIVATE_INTERFACES}
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in _SOURCES}
    own = {name for tree in trees.values() for node in ast.walk(tree) for name in _defined(node)}
    used = {(name, p.name) for p, tree in trees.items() for n in ast.walk(tree) for name in _used(n, own | _OUR_MARKS)}
    used |= set(_overridden_names(own))
    assert sorted(f"{name} in {place}" for name, place in used if name not in known) == []
    text = "".join(path.read_text(encoding="utf-8") for path in _SOURCES if path.name != "private_interfaces.py")
    assert [name for name in known if name not in text] == [], "the table has names that are not used any more"


def _is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name != "_"


def _defined(node: ast.AST) -> list[str]:
    """Names that a node gives to something of this package's own."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self" | "cls")):
            return [name]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def _used(node: ast.AST, own: set[str]) -> list[str]:
    """Private names that a node takes from another library, as far as they can be told from our own."""
    match node:
        case ast.ImportFrom(module=str(module), names=names) if not module.startswith("hf_megatron"):
            return [name for name in (*module.split("."), *(alias.name for alias in names)) if _is_private(name)]
        case ast.Attribute(attr=name) if _is_private(name) and name not in own:
            return [name]
        case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]):
            return [name] if _is_private(name) and name not in own else []
    return []


def _overridden_names(own: set[str]) -> Iterator[tuple[str, str]]:
    """Private names that classes of this package define and a class of another library that they derive from has."""
    for module in _modules():
        for our_class in vars(module).values():
            if not inspect.isclass(our_class) or our_class.__module__ != module.__name__:
                continue
            ours = [base for base in our_class.__mro__ if base.__module__.partition(".")[0] in _PACKAGES]
            names = {name for base in ours for name in vars(base) if _is_private(name)} & own
            for base in our_class.__mro__:
                if base not in ours:
                    yield from ((name, our_class.__name__) for name in names & vars(base).keys())


def _modules() -> Iterator[Any]:
    for name in _PACKAGES:
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not found.name.endswith(("__main__", "stock_check")):
                yield importlib.import_module(found.name)
