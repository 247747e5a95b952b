"""Safe pickle reader: parses a pickle as data without importing or calling anything.

A pickle is a program for a stack machine. This interpreter builds lists, dictionaries and scalars, and records each
requested call instead of making it. The result lists everything that the pickle refers to.

It reads every instruction as CPython's own unpickler does, so that nothing it reports can mean something else there.
What the two could read differently is refused.

Source: ``pickletools``, which documents the instructions, and ``Modules/_pickle.c``; ``_compat_pickle``, by which
Python reads the names that Python 2 had, as protocols before 3 still write them.
"""

from __future__ import annotations

import pickletools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from hf_megatron.checkpoint.budgets import (
    MAX_KEY_LENGTH,
    MAX_NAME_LENGTH,
    MAX_PICKLE_BYTES,
    MAX_PICKLE_INSTRUCTIONS,
    MAX_PICKLE_OBJECTS,
    BudgetError,
    require_within,
)
from hf_megatron.checkpoint.pickle_literals import LITERALS, integer

_MAX_LINE = 4096
_MAX_PROTOCOL = 5
# Implementation modules and their public names.
_ALIASES = {"posix": "os", "nt": "os"}
# Bytes of the length before an argument.
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
# By byte: the instruction's name, and how its argument is stored.
_INSTRUCTIONS = {
    ord(opcode.code): (opcode.name, None if opcode.arg is None else opcode.arg.n) for opcode in pickletools.opcodes
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NOT_PUSHING = {
    *("PROTO", "FRAME", "STOP", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "MARK", "POP", "POP_MARK", "BUILD"),
    *("APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS"),
}


class UnpickleError(ValueError):
    """The bytes are not a pickle, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Global:
    """A reference to ``attribute`` of ``module`` in a pickle, not resolved. An allowed one has no dot in attribute."""

    module: str
    attribute: str

    @property
    def name(self) -> str:
        """Dotted, for messages."""
        return f"{_ALIASES.get(self.module, self.module)}.{self.attribute}"


COMPUTED = Global("", "a callable that the pickle computes")
"""Takes the place of a callable that no name in the pickle stands for; it is in no list."""


@dataclass(slots=True, eq=False)
class Call:
    """A call that the pickle asks for and that was not made."""

    function: Global  # what would have been called, or the class of which the result would be an instance
    arguments: tuple[Any, ...]
    state: Any = None  # what the instance's attributes would have been set to
    items: list[Any] = field(default_factory=list)  # what would have been appended to it or stored in it


@dataclass(slots=True, eq=False)
class Key:
    """A key of a dictionary that is no text. Each is equal to itself only, as hashing it could take forever."""

    value: Any


@dataclass(frozen=True, slots=True)
class Unpickled:
    """The parsed object, with ``Call`` or ``Global`` for everything but containers and scalars, and all references."""

    value: Any
    names: tuple[Global, ...]
    calls: list[Call]

    def refused(self, allowed: Collection[Global]) -> list[str]:
        """The dotted names of the references that are not allowed, sorted."""
        return sorted(name.name for name in self.names if name not in allowed)


_MARK = object()
"""On the stack: the start of a group of items."""


def globals_in(module: str, *attributes: str) -> frozenset[Global]:
    """References to several attributes of a module, to be allowed."""
    return frozenset(Global(module, attribute) for attribute in attributes)


def read_pickle(stream: BinaryIO, load_persistent: Callable[[Any], Any] | None = None, *, factor: int = 1) -> Unpickled:
    """Read one pickle, from the stream's position, and leave the stream after its end.

    ``load_persistent`` turns a persistent id into an object; without it there must be none. UnpickleError if it is not
    a pickle, truncated or damaged, BudgetError if it asks for more than ``factor`` times what ``budgets`` allow.
    """
    machine = _Machine(stream, load_persistent, factor)
    try:
        value = machine.run()
    except (BudgetError, UnpickleError):
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error) as error:
        raise UnpickleError(f"it is not a pickle, or a damaged one ({type(error).__name__})") from error
    return Unpickled(value, tuple(machine.names), machine.calls)


class _Machine:
    """The pickle stack machine."""

    def __init__(self, stream: BinaryIO, load_persistent: Callable[[Any], Any] | None, factor: int) -> None:
        self.names: dict[Global, None] = {}
        self.calls: list[Call] = []
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._protocol = 0
        self._factor = factor
        self._stream, self._left = stream, factor * MAX_PICKLE_BYTES
        self._load_persistent = load_persistent

    def run(self) -> Any:
        """Execute instructions until the one that ends the pickle; the value that is left."""
        objects, max_objects = 0, self._factor * MAX_PICKLE_OBJECTS
        max_instructions = self._factor * MAX_PICKLE_INSTRUCTIONS
        for _ in range(max_instructions):
            name, kind = _INSTRUCTIONS[self._take(1)[0]]
            if name not in _NOT_PUSHING:
                objects += 1
                if objects > max_objects:
                    raise BudgetError(f"its pickle has more than {max_objects:,} objects, which is the limit")
            argument = b"" if kind is None else self._argument(kind)
            if name == "STOP":
                (value,) = self._stack
                if value is _MARK:
                    raise ValueError("no value")
                return value
            self._step(name, argument)
        raise BudgetError(f"its pickle has more than {max_instructions:,} instructions, which is the limit")

    def _take(self, size: int) -> bytes:
        """The next bytes of the pickle; no memory is reserved for more than there can be."""
        if size > self._left:
            limit = self._factor * MAX_PICKLE_BYTES
            require_within(limit, limit - self._left + size, "bytes in its pickle")
        self._left -= size
        data = self._stream.read(size)
        if len(data) < size:
            raise UnpickleError("its pickle ends early")
        return data

    def _line(self) -> bytes:
        line = self._stream.readline(_MAX_LINE)
        self._left -= len(line)
        if not line.endswith(b"\n"):
            raise UnpickleError(f"its pickle has a line without an end, or of {_MAX_LINE} bytes")
        return line[:-1]

    def _argument(self, kind: int) -> bytes:
        if kind == pickletools.UP_TO_NEWLINE:
            return self._line()
        return self._take(int.from_bytes(self._take(_LENGTH_BYTES[kind]), "little") if kind < 0 else kind)

    def _step(self, name: str, argument: bytes) -> None:
        """Execute one instruction."""
        stack = self._stack
        if (decode := LITERALS.get(name)) is not None:
            stack.append(decode(argument))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[int.from_bytes(argument, "little")] = self._top()
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[int.from_bytes(argument, "little")])
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name == "PUT":
            self._memo[integer(argument.decode("ascii"))] = self._top()
        elif name == "GET":
            stack.append(self._memo[integer(argument.decode("ascii"))])
        elif name == "PROTO":
            (self._protocol,) = argument
            if self._protocol > _MAX_PROTOCOL:
                raise UnpickleError(f"its pickle is of protocol {self._protocol}, and {_MAX_PROTOCOL} is the last one")
        elif name != "FRAME":
            self._combine(name, argument)

    def _combine(self, name: str, argument: bytes) -> None:
        """Execute instructions that combine items on the stack."""
        stack = self._stack
        match name:
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._pop_to_mark()
            case "DUP":
                stack.append(self._top())
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "LIST" | "FROZENSET":
                stack.append(self._pop_to_mark())
            case "APPEND":
                self._extend([self._pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_to_mark())
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self._pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = self._pop_to_mark()
                stack.append({})
                self._store(items)
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._store([key, value])
            case "SETITEMS":
                self._store(self._pop_to_mark())
            case _:
                self._refer(name, argument)

    def _refer(self, name: str, argument: bytes) -> None:
        """Record instructions that would look something up, or call it."""
        match name:
            case "GLOBAL":
                self._stack.append(self._global(argument.decode(), self._line().decode()))
            case "STACK_GLOBAL":
                attribute, module = self._pop(), self._pop()
                self._stack.append(self._global(module, attribute))
            case "INST":
                function = self._global(argument.decode(), self._line().decode())
                self._call(function, tuple(self._pop_to_mark()))
            case "OBJ":
                function, *rest = self._pop_to_mark()
                self._call(function, tuple(rest))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self._pop(), self._pop()
                self._call(function, arguments)
            case "NEWOBJ_EX":
                keywords, arguments, function = self._pop(), self._pop(), self._pop()
                self._call(function, (*arguments, keywords))
            case "BUILD":
                state = self._pop()
                # Ignore attributes of dictionaries, such as a state dict's _metadata.
                if isinstance(call := self._top(), Call):
                    if call.state is not None:
                        raise ValueError("attributes set twice")
                    call.state = state
            case "BINPERSID" if self._load_persistent is not None:
                self._stack.append(self._load_persistent(self._pop()))
            case _:
                raise ValueError(f"no instruction: {name}")

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a mark where a value is expected")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        position = len(self._stack) - 1
        while self._stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise ValueError("no mark")
        items = self._stack[position + 1 :]
        del self._stack[position:]
        return items

    def _global(self, module: Any, attribute: Any) -> Global:
        """A named reference, by its Python 3 name as far as Python translates it."""
        if type(module) is not str or type(attribute) is not str:
            raise TypeError("a name that is not text")
        require_within(MAX_NAME_LENGTH, max(len(module), len(attribute)), "characters in a name")
        if self._protocol < 3:
            renamed = IMPORT_MAPPING.get(module, module), attribute
            module, attribute = NAME_MAPPING.get((module, attribute), renamed)
        result = Global(module, attribute)
        self.names[result] = None
        return result

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global):
            self.names[COMPUTED] = None
            function = COMPUTED
        if not isinstance(arguments, tuple):
            raise TypeError("arguments are not a tuple")
        # Plain dictionaries keep their order, so OrderedDict is read as dict.
        is_dict = function == Global("collections", "OrderedDict") and not arguments
        if not is_dict:
            self.calls.append(Call(function, arguments))
        self._stack.append({} if is_dict else self.calls[-1])

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, (list, Call)):
            raise TypeError("items for what is not a list")
        (target if isinstance(target, list) else target.items).extend(items)

    def _store(self, items: list[Any]) -> None:
        target = self._top()
        if len(items) % 2 or not isinstance(target, (dict, Call)):
            raise TypeError("items for what is not a dictionary")
        for key in items[::2]:
            if type(key) is str:
                require_within(MAX_KEY_LENGTH, len(key), "characters in a key")
        if isinstance(target, Call):
            target.items.extend(items)
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) is str else Key(key)] = value
