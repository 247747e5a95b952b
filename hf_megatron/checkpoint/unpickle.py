"""Read a pickle as data: nothing that it names is imported, and nothing is called.

A pickle is a program for a stack machine. Here its instructions build lists, dictionaries and scalars, and where it
asks to call something, a record of the call takes the place of the result. What it asked for is therefore known
completely, and harmless, when the end is reached.

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

_MAX_BYTES = 32 * 2**20  # more than any state dict has, whose tensors take about 100 bytes each
_MAX_LINE = 4096
_SCALARS = (str, int, float, bytes, bool, type(None))
_COMPUTED = "a callable that the pickle computes"
# Modules that implement another one, by which people know their functions.
_ALIASES = {"posix": "os", "nt": "os"}
# Instructions that push their argument, and those that push something fixed.
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
    """Something that the pickle names, ``module.name``, and that was not looked up."""

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
    """An object, with ``Call`` or ``Global`` for all but containers and scalars, and the names that it asks for."""

    value: Any
    names: tuple[str, ...]


class _Mark:
    """Where a run of stack items starts."""


def read_pickle(stream: BinaryIO, load_persistent: Callable[[Any], Any] | None = None) -> Unpickled:
    """Read one pickle, from the stream's position, and leave the stream after its end.

    ``load_persistent`` turns a persistent id into an object; without it there must be none. UnpickleError if it is not
    a pickle, truncated, damaged, or larger than any state dict.
    """
    machine = _Machine(load_persistent)
    try:
        # Damaged text may hold escapes that Python warns of.
        with warnings.catch_warnings(action="ignore"):
            # Of the stream only the three methods of _Bounded are used.
            for opcode, argument, _ in pickletools.genops(cast(IO[bytes], _Bounded(stream))):
                machine.step(opcode.name, argument)
        (value,) = machine.stack
        if isinstance(value, _Mark):
            raise ValueError("no value")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, AssertionError) as error:
        raise UnpickleError(f"it is not a pickle, or a damaged one ({type(error).__name__})") from error
    return Unpickled(value, tuple(dict.fromkeys(machine.names)))


class _Bounded:
    """A stream on which a damaged length can neither reserve gigabytes nor read on for ever."""

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
    """The stack machine."""

    def __init__(self, load_persistent: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self.names: list[str] = []
        self._memo: dict[int, Any] = {}
        self._load_persistent = load_persistent

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction, given its decoded argument."""
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
        """Instructions whose argument is a name or a persistent id."""
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
        """Instructions that make something of what lies on the stack."""
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
        """Instructions that would call something."""
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
                # Of a dictionary, attributes such as a state dict's _metadata are of no use here.
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
        """Something named, by the names that Python 3 has for it."""
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
        # A dictionary that remembers the order, which all do here, so that nobody has to tell the two apart.
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
            # Hashing tuples of tuples of one tuple could take for ever.
            is_flat = all(isinstance(part, _SCALARS) for part in (key if isinstance(key, tuple) else [key]))
            target[key if is_flat else f"a {type(key).__name__}"] = value
