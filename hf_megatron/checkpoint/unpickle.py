"""Safe pickle reader: parses a pickle as data without importing or calling anything.

A pickle is a program for a stack machine. This interpreter builds lists, dictionaries and scalars, and records each
requested call instead of making it. The result lists everything that the pickle refers to.

Source: ``pickletools``, which documents and decodes the instructions; ``_compat_pickle``, by which Python reads the
names that Python 2 had, as protocol 2 still writes them.
"""

from __future__ import annotations

import pickletools
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO, cast

_MAX_BYTES = 32 * 2**20  # more than any state dict needs: about 100 bytes per tensor
_MAX_LINE = 4096
_SCALARS = (str, int, float, bytes, bool, type(None))
_COMPUTED = "a callable that the pickle computes"
# Implementation modules and their public names.
_ALIASES = {"posix": "os", "nt": "os"}
# Instructions that push their argument, and those that push a constant.
_LITERALS = frozenset(
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg and not opcode.stack_before and opcode.stack_after not in ([], [pickletools.anyobject])
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class UnpickleError(ValueError):
    """The bytes are not a pickle, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Global:
    """A reference to ``module.name`` in a pickle, not resolved."""

    name: str


@dataclass(slots=True, eq=False)
class Call:
    """A call that the pickle asks for and that was not made."""

    function: str  # name of what would have been called, or the class of which the result would be an instance
    arguments: tuple[Any, ...]
    state: Any = None  # what the instance's attributes would have been set to
    items: list[Any] = field(default_factory=list)  # what would have been appended to it or stored in it


@dataclass(frozen=True, slots=True)
class Unpickled:
    """The parsed object, with ``Call`` or ``Global`` for everything but containers and scalars, and all references."""

    value: Any
    names: tuple[str, ...]


class _Mark:
    """A mark on the stack: the start of a group of items."""


def read_pickle(stream: BinaryIO, load_persistent: Callable[[Any], Any] | None = None) -> Unpickled:
    """Read one pickle, from the stream's position, and leave the stream after its end.

    ``load_persistent`` turns a persistent id into an object; without it there must be none. UnpickleError if it is not
    a pickle, truncated, damaged, or larger than any state dict.
    """
    machine = _Machine(load_persistent)
    try:
        # Damaged text may contain invalid escapes, about which Python warns.
        with warnings.catch_warnings(action="ignore"):
            # pickletools uses only the three methods of _Bounded.
            for opcode, argument, _ in pickletools.genops(cast(IO[bytes], _Bounded(stream))):
                machine.step(opcode.name, argument)
        (value,) = machine.stack
        if isinstance(value, _Mark):
            raise ValueError("no value")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, AssertionError) as error:
        raise UnpickleError(f"it is not a pickle, or a damaged one ({type(error).__name__})") from error
    return Unpickled(value, tuple(dict.fromkeys(machine.names)))


class _Bounded:
    """A stream with a size limit, so that a damaged length cannot allocate gigabytes or read forever."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._left = stream, _MAX_BYTES
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise ValueError("longer than any state dict")
        self._left -= size
        return self._stream.read(size)

    def readline(self) -> bytes:
        line = self._stream.readline(_MAX_LINE)
        self._left -= len(line)
        return line


class _Machine:
    """The pickle stack machine."""

    def __init__(self, load_persistent: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self.names: list[str] = []
        self._memo: dict[int, Any] = {}
        self._load_persistent = load_persistent

    def step(self, name: str, argument: Any) -> None:
        """Execute one instruction, given its decoded argument."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[int(argument)])
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._combine(name) if argument is None else self._push_named(name, argument)

    def _push_named(self, name: str, argument: Any) -> None:
        """Execute instructions whose argument is a name or a persistent id."""
        match name:
            case "GLOBAL":
                self.stack.append(self._name(*argument.split(" ", 1)))
            case "INST":
                self._call(self._name(*argument.split(" ", 1)), tuple(self._pop_to_mark()))
            case "EXT1" | "EXT2" | "EXT4":
                self.stack.append(self._name("extension", str(argument)))
            case "PERSID":
                self._push_persistent(argument)
            case _:
                raise ValueError(f"no instruction: {name}")

    def _combine(self, name: str) -> None:
        """Execute instructions that combine items on the stack."""
        stack = self.stack
        match name:
            case "MARK":
                stack.append(_Mark())
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._pop_to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "LIST" | "FROZENSET":
                stack.append(self._pop_to_mark())
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_to_mark())
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = self._pop_to_mark()
                stack.append({})
                self._store(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._store([key, value])
            case "SETITEMS":
                self._store(self._pop_to_mark())
            case _:
                self._call_by(name)

    def _call_by(self, name: str) -> None:
        """Record instructions that would call something."""
        stack = self.stack
        match name:
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if not isinstance(attribute, str) or not isinstance(module, str):
                    raise TypeError("a name that is not text")
                stack.append(self._name(module[:_MAX_LINE], attribute[:_MAX_LINE]))
            case "BINPERSID":
                self._push_persistent(stack.pop())
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                self._call(function, arguments)
            case "NEWOBJ_EX":
                keywords, arguments, function = stack.pop(), stack.pop(), stack.pop()
                self._call(function, (*arguments, keywords))
            case "OBJ":
                function, *rest = self._pop_to_mark()
                self._call(function, tuple(rest))
            case "BUILD":
                state = stack.pop()
                # Ignore attributes of dictionaries, such as a state dict's _metadata.
                if isinstance(stack[-1], Call):
                    stack[-1].state = state
            case _:
                raise ValueError(f"no instruction: {name}")

    def _pop_to_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while not isinstance(self.stack[position], _Mark):
            position -= 1
            if position < 0:
                raise ValueError("no mark")
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def _name(self, module: str, name: str) -> Global:
        """A named reference, translated to its Python 3 name."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.names.append(f"{_ALIASES.get(module, module)}.{name}")
        return Global(self.names[-1])

    def _push_persistent(self, persistent_id: Any) -> None:
        if self._load_persistent is None:
            raise ValueError("a persistent id where none is expected")
        self.stack.append(self._load_persistent(persistent_id))

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global):
            self.names.append(_COMPUTED)
            function = Global(_COMPUTED)
        if not isinstance(arguments, tuple):
            raise TypeError("arguments are not a tuple")
        # Plain dictionaries keep their order, so OrderedDict is read as dict.
        is_dict = function.name == "collections.OrderedDict" and not arguments
        self.stack.append({} if is_dict else Call(function.name, arguments))

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (list, Call)):
            raise TypeError("items for what is not a list")
        (target if isinstance(target, list) else target.items).extend(items)

    def _store(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Call):
            target.items.extend(items)
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("items for what is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing deeply nested shared tuples could take forever.
            is_flat = all(isinstance(part, _SCALARS) for part in (key if isinstance(key, tuple) else [key]))
            target[key if is_flat else f"a {type(key).__name__}"] = value
