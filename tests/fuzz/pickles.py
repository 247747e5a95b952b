"""Strategies for pickles: a program for a stack machine, changed instruction by instruction."""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

from hypothesis import strategies as st

from tests.fuzz.guard import CANARY

Draw = Callable[[st.SearchStrategy[Any]], Any]
T = TypeVar("T")

INTEGERS = st.one_of(
    st.integers(-2, 12),
    st.sampled_from([2**p + d for p in (7, 8, 15, 16, 31, 32, 61, 62, 63, 64, 65, 127) for d in (-1, 0, 1)]),
    st.sampled_from([-(2**p) - d for p in (7, 15, 31, 63) for d in (0, 1)]),
    st.sampled_from([131, 8, 16, 24, 32, 1000, 10**6, 10**9, 10**30, 10**300, -(10**300)]),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", "model", "args", "weight", "wte.weight", "storage", "0", "cpu", "big", "\ud800", "\x1b[31mred"]
    ),
    st.sampled_from(["a" * 300, "a/../../b", "/etc/passwd", "\x00", "\n", "\u202e", "1" * 5000, "x" * 2000, ".", ".."]),
    st.text(max_size=6),
)
# What hostile pickles ask for, and what harmless ones do, spelled in ways that a reader may take for harmless.
_GLOBALS = [
    (CANARY, "fire"),
    ("os", "system"),
    ("posix", "system"),
    ("__builtin__", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("subprocess", "Popen"),
    ("torch", "os.system"),
    ("torch._utils", "os.system"),
    ("collections", "OrderedDict.fromkeys"),
    ("collections", "abc.sys.modules"),
    ("megatron.core._rank_utils", "os.system"),
    ("megatron.core", "enums.ModelType"),
    ("megatron", "a" * 5000),
    ("argparse", "Namespace"),
    ("argparse", "_os.system"),
    ("types.SimpleNamespace", "__class__"),
    ("torch", ""),
    ("", "torch"),
    ("torch.FloatStorage", "__init__"),
    ("torch", "FloatStorage"),
    ("torch", "BFloat16Storage"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "nn.Module"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.storage", "UntypedStorage"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "dtype"),
    ("datetime", "timedelta"),
    ("copy_reg", "_reconstructor"),
    ("_io", "BytesIO"),
    ("signal", "Signals"),
]


def pick(draw: Draw, items: Sequence[T]) -> T:
    """One of the items; ``sampled_from`` would hash them first, which takes for ever for some."""
    return items[draw(st.integers(0, len(items) - 1))]


def rarely(draw: Draw, number: int) -> bool:
    """True once in so many times, and never in the simplest case; hypothesis prefers the ends of a range."""
    return bool(draw(st.integers(0, number - 1)) == number // 2)


def integer(draw: Draw) -> bytes:
    """A number, in one of the instructions for numbers, perhaps of more digits than Python turns into text."""
    if rarely(draw, 8):
        digits = pick(draw, [4000, 4400, 20000])
        body = pickle.encode_long(1 << 3 * digits)
        return pick(draw, [b"L" + b"7" * digits + b"L\n", b"\x8b" + struct.pack("<i", len(body)) + body])
    number = draw(INTEGERS)
    body = pickle.encode_long(number)
    forms = [b"I%d\n" % number, b"L%dL\n" % number, b"\x8b" + struct.pack("<i", len(body)) + body]
    forms += [b"\x8a" + bytes([len(body)]) + body] if len(body) < 256 else []
    forms += [b"K" + bytes([number])] if 0 <= number < 256 else []
    forms += [b"J" + struct.pack("<i", number)] if -(2**31) <= number < 2**31 else []
    return pick(draw, forms)


def text(draw: Draw) -> bytes:
    """Text, in one of the instructions for it."""
    raw = str(draw(TEXTS)).encode("utf-8", "surrogatepass")
    forms = [b"X" + struct.pack("<I", len(raw)) + raw, b"\x8d" + struct.pack("<Q", len(raw)) + raw]
    forms += [b"\x8c" + bytes([len(raw)]) + raw, b"U" + bytes([len(raw)]) + raw] if len(raw) < 256 else []
    forms += [b"V" + raw.replace(b"\n", b"") + b"\n", b"T" + struct.pack("<i", len(raw)) + raw]
    return pick(draw, forms)


def a_global(draw: Draw) -> bytes:
    """A reference to a module's attribute."""
    module, name = (part.encode() for part in pick(draw, _GLOBALS))
    forms = [b"c" + module + b"\n" + name + b"\n"] * 2 + [_unicode(module) + _unicode(name) + b"\x93"] * 2
    forms += [b"(i" + module + b"\n" + name + b"\n", b"\x82\x01", b"\x83\x01\x02"]
    return pick(draw, forms)


def _unicode(raw: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(draw: Draw) -> bytes:
    """A call, of one of the instructions for calls, on operands that may not fit."""
    function = pick(draw, [a_global, a_global, a_global, text, integer])(draw)
    operands = [_tuple(draw), b")", b"]", b"N", b"}"]
    arguments, keywords, state = (pick(draw, operands) for _ in range(3))
    forms = [function + arguments + b"R", function + arguments + b"\x81", b"(" + function + arguments + b"o"]
    made = pick(draw, [*forms, function + arguments + keywords + b"\x92"])
    return made + (state + b"b" if draw(st.booleans()) else b"")


def _tuple(draw: Draw) -> bytes:
    count = draw(st.integers(0, 3))
    return b"(" + b"".join(pick(draw, [integer, text, a_global])(draw) for _ in range(count)) + b"t"


def tensor(draw: Draw) -> bytes:
    """A call for a tensor, whose shape, strides, offset or storage may be impossible."""
    rank = draw(st.integers(0, 3))
    shape, strides = (b"(" + b"".join(integer(draw) for _ in range(rank)) + b"t" for _ in range(2))
    kind = pick(draw, [b"FloatStorage", b"HalfStorage", b"BoolStorage", b"CharStorage"])
    key, numel = pick(draw, [b"0", b"1", b"7", b"../x"]), integer(draw)
    persistent = b"(" + _unicode(b"storage") + b"ctorch\n" + kind + b"\n" + _unicode(key) + _unicode(b"cpu") + numel
    view = pick(draw, [b"", b"N", b"(" + _unicode(b"v") + integer(draw) + integer(draw) + b"t"])
    arguments = persistent + view + b"tQ" + integer(draw) + shape + strides + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def persistent(draw: Draw) -> bytes:
    """A persistent id that is not a storage's."""
    return pick(draw, [b"Pstorage\n", b"NQ", b")Q", b"]Q", _tuple(draw) + b"Q", text(draw) + b"Q"])


# What is small in a pickle and large, deep, endless or slow to hash outside, by a count.
_KNOTS: list[Callable[[int], bytes]] = [
    lambda n: b")" + b"2\x86" * min(n, 60),  # tuples that share their halves
    lambda n: b"]" + b"2\x86" * min(n, 60),
    lambda n: b"K\x01" + b"q\xffh\xff\x86" * min(n, 60),
    lambda n: b"]q\xfeh\xfea",  # a list in itself
    lambda n: b"}q\xfdK\x01h\xfds",  # a dictionary in itself
    lambda n: b"]q\xfch\xfc\x85q\xfbh\xfca0h\xfb",  # through a tuple
    lambda n: b")" + b"\x85" * n,
    lambda n: b"]" * n + b"a" * (n - 1),
    lambda n: b"}" + b"K\x01}" * n + b"s" * n,
    lambda n: b"N" + b"0N" * n,
    lambda n: b"(" + b"N" * n + b"t",
    lambda n: b"(" + b"}" * n + b"l",
    lambda n: b"}(" + b"".join(key + b"N" for key in _colliding(n)) + b"u",
    lambda n: b"\x8f(" + b"".join(_colliding(n)) + b"\x90",
    lambda n: b"}(" + b"K\x01N" * n + b"u",  # one key again and again
    lambda n: b"}()" + b"2\x86" * min(n, 60) + b"Nu",
    lambda n: b"()" + b"2\x86" * min(n, 60) + b"\x91",
    lambda n: b"X" + struct.pack("<I", 40 * n) + b"x" * 40 * n,
    lambda n: b"N" + b"q\x01" * n + b"\x94" * n,
    lambda n: b"Nr" + struct.pack("<I", 2**31 - 1 + n),
]


def _colliding(count: int) -> list[bytes]:
    """Numbers of one hash."""
    return [b"\x8a\x0a" + ((2**61 - 1) * n).to_bytes(10, "little") for n in range(1, count)]


def knot(draw: Draw) -> bytes:
    """One of them; rarely large."""
    return pick(draw, _KNOTS)(pick(draw, [3, 3, 20, 20, 60, 60, 1200, 20000]))


def scalar(draw: Draw) -> bytes:
    """Constants, floating-point numbers, bytes, and protocol 5's buffers."""
    number = pick(draw, [0.5, float("nan"), float("inf"), -0.0, 1e308])
    forms = [
        b"N",
        b"\x88",
        b"\x89",
        b"G" + struct.pack(">d", number),
        b"Fnan\n",
        b"F1_0\n",
        b"I01\n",
        b"I00\n",
        b"C\x02ab",
    ]
    forms += [b"\x96" + struct.pack("<Q", 3) + b"abc", b"\x97", b"\x97\x98", b"B" + struct.pack("<I", 1) + b"a"]
    return pick(draw, [*forms, b"S'a'\n", b'S"\\x00"\n', b"Sx\n", b"\x8e" + struct.pack("<Q", 2) + b"ab"])


_VALUES = [integer, integer, integer, text, text, scalar, tensor, call, a_global, persistent, knot, _tuple]
# Instructions that need what may not be there.
_LOOSE = [
    b"0",
    b"1",
    b"2",
    b"(",
    b"a",
    b"e",
    b"s",
    b"u",
    b"t",
    b"l",
    b"d",
    b"b",
    b"R",
    b"\x81",
    b"\x92",
    b"\x93",
    b"\x85",
]
_LOOSE += [
    b"\x86",
    b"\x87",
    b"\x90",
    b"\x91",
    b"Q",
    b"o",
    b".",
    b"\x94",
    b"h\x00",
    b"g7\n",
    b"p3\n",
    b"q\x00",
    b"j\0\0\0\1",
]
_LOOSE += [b"\x80\x00", b"\x80\x05", b"\x80\xff", b"\x95" + b"\x00" * 8, b"\x95" + b"\xff" * 8, b"", b"\xfe"]


def value(draw: Draw) -> bytes:
    """Instructions that leave one value on the stack."""
    return pick(draw, _VALUES)(draw)


@cache
def instructions(content: bytes) -> tuple[tuple[str, bytes], ...]:
    """A pickle's instructions, each with its name."""
    found = [(opcode.name, position) for opcode, _, position in pickletools.genops(content)]
    stops = [position for _, position in found[1:]] + [len(content)]
    return tuple((name, content[first:stop]) for (name, first), stop in zip(found, stops, strict=True))


_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG")
_NAMES = ("BINUNICODE", "SHORT_BINUNICODE", "UNICODE")
_EDITS = ["number", "number", "name", "name", "global", "value", "insert", "loose", "delete", "again", "swap"]


def edited(draw: Draw, content: bytes, most: int = 3) -> bytes:
    """A pickle with some of its instructions changed."""
    try:
        parts = list(instructions(content))
    except (ValueError, IndexError):  # it has been changed before, and is no pickle any more
        return content
    for _ in range(draw(st.integers(0, most))):
        edit = pick(draw, _EDITS)
        kinds = {"number": _NUMBERS, "name": _NAMES, "global": ("GLOBAL", "STACK_GLOBAL")}.get(edit)
        places = [i for i, (name, _) in enumerate(parts) if kinds is None or name in kinds]
        if not places:
            continue
        at = pick(draw, places)
        match edit:
            case "number":
                parts[at] = ("", integer(draw))
            case "name":
                parts[at] = ("", text(draw))
            case "global":
                # What STACK_GLOBAL would have taken from the stack goes with it.
                parts[at] = ("", (b"00" if parts[at][0] == "STACK_GLOBAL" else b"") + a_global(draw))
            case "value":
                parts[at] = ("", value(draw))
            case "insert":
                # Dropped at once, or wrapped around: the stack stays as it was.
                parts.insert(at, ("", value(draw) + pick(draw, [b"0", b"0", b"\x86", b""])))
            case "loose":
                parts.insert(at, ("", pick(draw, _LOOSE)))
            case "delete":
                del parts[at]
            case "again":
                parts[at:at] = parts[at : at + draw(st.integers(1, 12))]
            case "swap":
                other = pick(draw, places)
                parts[at], parts[other] = parts[other], parts[at]
    return b"".join(raw for _, raw in parts)


def whole(draw: Draw) -> bytes:
    """A pickle made of nothing but hostile values."""
    items = b"".join(value(draw) for _ in range(draw(st.integers(1, 3))))
    prefix = pick(draw, [b"", b"\x80\x02", b"\x80\x04", b"\x80\x05"])
    return prefix + pick(draw, [b"(%bt.", b"(%bl.", b"}(X\x01\x00\x00\x00a(%bltu.", b"(%bd.", b"%b."]) % items


@st.composite
def pickles(draw: Draw, seeds: Sequence[bytes]) -> bytes:
    """A changed seed, or a pickle of hostile values."""
    if rarely(draw, 4):
        return whole(draw)
    return edited(draw, pick(draw, seeds), most=5)
