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
from typing import IO, Any, Protocol, cast

# Larger than any state dict, whose tensors take about 100 bytes each.
_MAX_BYTES = 32 * 2**20
_MAX_LINE = 4096
_SCALARS = (str, int, float, bytes, bool, type(None))
_COMPUTED = "a callable that the pickle computes"
# Modules that implement another one, by which people know their functions.
_ALIASES = {"posix": "os", "nt": "os"}


class UnpickleError(ValueError):
    """The bytes are not a pickle, or a damaged one."""


class Stream(Protocol):
    """What is read from: an open binary file."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self, size: int, /) -> bytes: ...
    def tell(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Global:
    """Something that the pickle names, ``module.name``, and that was not looked up."""

    name: str


@dataclass(slots=True, eq=False)
class Call:
    """A call that the pickle asks for and that was not made: what would have become of its result.

    Attributes:
        function: Name of what would have been called, or the class of which this would have been an instance.
        arguments: The positional arguments.
        state: What the instance's attributes would have been set to.
        items: What would have been appended to it or stored in it.
    """

    function: str
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Unpickled:
    """What a pickle holds.

    Attributes:
        value: The object: containers, scalars, and ``Call`` or ``Global`` for everything else.
        names: Every ``module.name`` that it asks for, in order.
    """

    value: Any
    names: tuple[str, ...]


class _Mark:
    """Where a run of stack items starts."""


def read_pickle(stream: Stream, load_persistent: Callable[[Any], Any] | None = None) -> Unpickled:
    """Read one pickle and leave the stream after its end.

    Args:
        stream: Positioned at the pickle's first byte.
        load_persistent: Turns a persistent id into an object; without it there must be none.

    Raises:
        UnpickleError: Not a pickle, truncated, damaged, or larger than any state dict.
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

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._left = _MAX_BYTES

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise ValueError("longer than any state dict")
        self._left -= size
        return self._stream.read(size)

    def readline(self) -> bytes:
        line = self._stream.readline(_MAX_LINE)
        self._left -= len(line)
        return line

    def tell(self) -> int:
        return self._stream.tell()


class _Machine:
    """The stack machine."""

    def __init__(self, load_persistent: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self.names: list[str] = []
        self._memo: dict[int, Any] = {}
        self._load_persistent = load_persistent

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif name in _PUSH:
            self.stack.append(_PUSH[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[int(argument)])
        else:
            getattr(self, f"_{name.lower()}")(argument)

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

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global):
            self.names.append(_COMPUTED)
            function = Global(_COMPUTED)
        if not isinstance(arguments, tuple):
            raise TypeError("arguments are not a tuple")
        # A dictionary that remembers the order, which all do here, so that nobody has to tell the two apart.
        is_dict = function.name == "collections.OrderedDict" and not arguments
        self.stack.append({} if is_dict else Call(function.name, arguments))

    # --- Instructions, by name; each takes the decoded argument.

    def _stop(self, argument: None) -> None:
        pass

    _proto = _frame = _stop

    def _pop(self, argument: None) -> None:
        self.stack.pop()

    def _pop_mark(self, argument: None) -> None:
        self._pop_to_mark()

    def _dup(self, argument: None) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self, argument: None) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def _persid(self, argument: str) -> None:
        self.stack.append(argument)
        self._binpersid(None)

    def _binpersid(self, argument: None) -> None:
        if self._load_persistent is None:
            raise ValueError("a persistent id where none is expected")
        self.stack.append(self._load_persistent(self.stack.pop()))

    def _global(self, argument: str) -> None:
        self.stack.append(self._name(*argument.split(" ", 1)))

    def _stack_global(self, argument: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name that is not text")
        self.stack.append(self._name(module[:_MAX_LINE], name[:_MAX_LINE]))

    def _ext1(self, argument: int) -> None:
        self.stack.append(self._name("extension", str(argument)))

    _ext2 = _ext4 = _ext1

    def _reduce(self, argument: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self._call(function, arguments)

    _newobj = _reduce

    def _newobj_ex(self, argument: None) -> None:
        keywords, arguments, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self._call(function, (*arguments, keywords))

    def _inst(self, argument: str) -> None:
        arguments = tuple(self._pop_to_mark())
        self._call(self._name(*argument.split(" ", 1)), arguments)

    def _obj(self, argument: None) -> None:
        function, *arguments = self._pop_to_mark()
        self._call(function, tuple(arguments))

    def _build(self, argument: None) -> None:
        state = self.stack.pop()
        # Of a dictionary, attributes such as a state dict's _metadata are of no use here.
        if isinstance(self.stack[-1], Call):
            self.stack[-1].state = state

    def _tuple(self, argument: None) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _list(self, argument: None) -> None:
        self.stack.append(self._pop_to_mark())

    _frozenset = _list

    def _dict(self, argument: None) -> None:
        items = self._pop_to_mark()
        self.stack.append({})
        self._store(items)

    def _tuple1(self, argument: None) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, argument: None) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self, argument: None) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _append(self, argument: None) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _appends(self, argument: None) -> None:
        self._extend(self._pop_to_mark())

    _additems = _appends

    def _setitem(self, argument: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._store([key, value])

    def _setitems(self, argument: None) -> None:
        self._store(self._pop_to_mark())

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
            is_flat = isinstance(key, _SCALARS) or (
                isinstance(key, tuple) and all(isinstance(k, _SCALARS) for k in key)
            )
            target[key if is_flat else f"a {type(key).__name__}"] = value


_PUSH_ARGUMENT = frozenset(
    (
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    )
)
_PUSH: dict[str, Callable[[], Any]] = {
    "MARK": _Mark,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
